"""domain_bn on layers that people write themselves: a domain has what a layer fed only that domain would have."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import domain_bn, precise_bn
from tests.hand_written import CHANNELS, TRUE, UNTOLD, ZOO, HandWritten, Net, batches

RESHAPED = [
    *("transposed", "rows", "padded", "masked", "masked, arguments by name", "container", "counts itself"),
    *("BatchNorm2d", "timm BatchNormAct2d", "torch.batch_norm", "own statistics, in place"),
]
"""Layers of one call, which keep torch's conventions or have us keep them."""
MIXED = ["plain", "transposed", "padded", "BatchNorm2d", "timm BatchNormAct2d", "torch.batch_norm"]
"""Those that a batch of several domains goes into, sample by sample."""
CANNOT = {
    "train_statistics='shared'": ("shared", ["rows", "masked", "container"]),
    "train_statistics='domain'": ("domain", ["container"]),
}


class Single(nn.Module):
    """A layer of the zoo behind a convolution."""

    def __init__(self, entry: HandWritten) -> None:
        super().__init__()
        self.entry, self.inside, self.bn = entry, nn.Conv1d(3, CHANNELS, 1), entry.make(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.entry.use(self.bn, self.inside(x), x)


def add_domains(model: nn.Module, sgd: str, population: str = "domain", **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return domain_bn(
            model, num_domains=2, train_statistics=sgd, population_statistics=population, affine="shared", **options
        )  # type: ignore[arg-type]


def train(model: nn.Module, data: list[tuple[Tensor, int]], use_domain: Callable[[int], Any]) -> None:
    for x, domain in data:
        with use_domain(domain):
            model(x)


def rows_given(net: Single, data: list[Tensor]) -> Tensor:
    """What the layer's call is given of some batches, ``(count, C)``."""
    assert net.entry.given is not None
    found = [net.entry.given(net.inside(x), x)[""] for x in data]
    return torch.cat([rows for calls in found for rows in calls]).detach()


@pytest.mark.parametrize("sgd", ["shared", "domain"])
@pytest.mark.parametrize("name", RESHAPED)
def test_a_domains_statistics_are_those_of_what_its_calls_were_given(name: str, sgd: str) -> None:
    net = Single(ZOO[name]).train()
    data = [(x, i % 2) for i, x in enumerate(batches([4, 6, 4, 6, 8]))]
    truth = {}
    for domain in (0, 1):
        mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
        for x in (x for x, d in data if d == domain):
            rows = rows_given(net, [x])
            mean, var = mean.lerp(rows.mean(0), 0.1), var.lerp(rows.var(0), 0.1)
        truth[domain] = mean, var
    handle = add_domains(net, sgd)
    train(net, data, handle.use_domain)
    own = handle.state()["bn"]
    for domain, (mean, var) in truth.items():
        torch.testing.assert_close(own["domain_mean"][domain].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own["domain_var"][domain].double(), var, rtol=1e-4, atol=1e-5)
    assert own["domain_batches"].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("sgd", "batch_size"), [("shared", "population"), ("domain", "loader"), ("domain", "population")]
)
@pytest.mark.parametrize(
    "name", ["transposed", "masked", "container", "timm BatchNormAct2d", "own statistics, in place"]
)
def test_a_pass_measures_each_domain_at_the_call(name: str, sgd: str, batch_size: Any) -> None:
    net = Single(ZOO[name]).train()
    data = [(x, i % 2) for i, x in enumerate(batches([4, 4, 4, 4]))]
    handle = add_domains(net, sgd)

    def forward(model: nn.Module, batch: tuple[Tensor, int]) -> None:
        train(model, [batch], handle.use_domain)

    precise_bn(
        net, data, forward=forward, normalization_batch_size=batch_size, batch_size_fn=lambda batch: len(batch[0])
    )
    own = handle.state()["bn"]
    for domain in (0, 1):
        parts = [rows_given(net, [x]) for x, d in data if d == domain]
        mean = torch.cat(parts).mean(0)
        torch.testing.assert_close(own["domain_mean"][domain].double(), mean, rtol=1e-4, atol=1e-5)
        if batch_size == "population":
            var = torch.cat(parts).var(0, correction=0)
            torch.testing.assert_close(own["domain_var"][domain].double(), var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sgd", ["shared", "domain"])
@pytest.mark.parametrize("name", MIXED)
def test_samples_of_several_domains_are_told_apart_at_the_call(name: str, sgd: str) -> None:
    net = Single(ZOO[name]).train()
    domain, (x,) = torch.tensor([0, 1, 1, 0, 0, 1]), batches([6])
    handle = add_domains(net, sgd)
    with handle.use_domain(domain):
        net(x)
    own = handle.state()["bn"]
    for d in (0, 1):
        rows = rows_given(net, [x[domain == d]])
        torch.testing.assert_close(own["domain_mean"][d].double(), 0.1 * rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own["domain_var"][d].double(), 0.9 + 0.1 * rows.var(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sgd", "name"), [(sgd, name) for sgd, names in CANNOT.values() for name in names])
def test_what_is_mixed_up_before_the_call_is_refused_by_name(sgd: str, name: str) -> None:
    net = Single(ZOO[name]).train()
    handle = add_domains(net, sgd)
    (x,) = batches([4])
    with handle.use_domain(torch.tensor([0, 1, 1, 0])), pytest.raises((TypeError, ValueError), match=r"'bn'.*layers="):
        net(x)
    with handle.use_domain(1):
        net(x)


@pytest.mark.parametrize("sgd", ["shared", "domain"])
@pytest.mark.parametrize("name", [name for name in [*TRUE, *UNTOLD] if not ZOO[name].is_seen])
def test_a_hand_written_layer_is_refused_by_name_and_the_way_out_works(name: str, sgd: str) -> None:
    net = Net(ZOO[name]).train()
    handle = add_domains(net, sgd)
    (x,) = batches([4])
    with handle.use_domain(0), pytest.raises(TypeError, match=r"'bn' does not call .*layers="):
        net(x)
    handle.undo()
    handle = add_domains(net, sgd, layers="last")
    with handle.use_domain(0):
        net(x)
    assert handle.state()["last"]["domain_batches"].tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["layer in eval mode", "momentum 0"])
@pytest.mark.parametrize("sgd", ["shared", "domain"])
def test_a_call_in_eval_mode_within_a_pass_uses_the_domains_statistics_and_counts_for_nothing(
    sgd: str, kind: str
) -> None:
    net = nn.Sequential(nn.BatchNorm1d(3)).train()
    handle = add_domains(net, sgd)
    data = [(torch.randn(16, 3) + 5 * d, d) for d in (0, 1)]
    train(net, data, handle.use_domain)
    before = copy.deepcopy(handle.state()["0"])
    outputs = {}

    def forward(model: Any, batch: tuple[Tensor, int]) -> None:
        x, domain = batch
        with handle.use_domain(domain):
            model(x)
            layer = model[0]
            if kind == "momentum 0":
                layer.momentum = 0.0
                model(x * 100)
                layer.momentum = 0.1
            else:
                layer.eval()
                outputs[domain] = model(x * 100)
                layer.train()

    precise_bn(net, data, forward=forward, normalization_batch_size="loader")
    own = handle.state()["0"]
    for x, d in data:
        torch.testing.assert_close(own["domain_mean"][d], x.mean(0), rtol=1e-4, atol=1e-5)
        if outputs:
            expected = (x * 100 - before["domain_mean"][d]) / (before["domain_var"][d] + 1e-5).sqrt()
            torch.testing.assert_close(outputs[d], expected, rtol=1e-4, atol=1e-4)
