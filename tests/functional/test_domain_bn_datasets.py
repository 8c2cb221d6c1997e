"""domain_bn on datasets: a domain for each batch, or for each sample of it, against Table 5's rows by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import domain_bn, find_bn, precise_bn
from tests.functional.domains import EVERY, choices


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)
    ).double()


def given(model: nn.Module, row: int, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return domain_bn(model, num_domains=3, **choices(row), **options)


def batch(seed: int, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Images whose mean and spread are those of their domain."""
    own = torch.Generator().manual_seed(seed)
    domain = torch.tensor(ids)
    x = torch.randn(len(ids), 2, 6, 5, generator=own, dtype=torch.float64)
    return x * (1 + domain.view(-1, 1, 1, 1)) + 3 * domain.view(-1, 1, 1, 1), domain


BATCHES = [batch(0, [0, 1, 2, 1, 0]), batch(1, [2, 0, 0, 2]), batch(2, [1, 1, 1]), batch(3, [2, 1, 0, 0, 0, 2])]


class ByHand:
    """The same network, its BatchNorm written out."""

    def __init__(self, model: nn.Sequential, row: int) -> None:
        self.model, (self.sgd, self.population, self.affine) = model, EVERY[row]
        layers = find_bn(model).values()
        self.means = {m: m.running_mean.expand(3, -1).clone() for m in layers}
        self.variances = {m: m.running_var.expand(3, -1).clone() for m in layers}
        self.running = {m: (m.running_mean.clone(), m.running_var.clone()) for m in layers}

    def __call__(self, x: Tensor, domain: Tensor) -> Tensor:
        for m in self.model:
            x = (
                self.normalized(m, x, domain)
                if isinstance(m, nn.BatchNorm2d)
                else F.relu(x)
                if isinstance(m, nn.ReLU)
                else m(x)
            )
        return x

    def normalized(self, bn: nn.BatchNorm2d, x: Tensor, domain: Tensor) -> Tensor:
        groups = [(d, domain == d) for d in range(3) if (domain == d).any()]
        parts = {d: x[own].movedim(1, -1).flatten(0, -2) for d, own in groups}
        whole = x.movedim(1, -1).flatten(0, -2)
        y = torch.empty_like(x)
        for d, own in groups:
            if bn.training:
                rows = parts[d] if self.sgd == "domain" else whole
                mean, var = rows.mean(0), rows.var(0, correction=0)
                self.means[bn][d].lerp_(parts[d].detach().mean(0), 0.1)
                self.variances[bn][d].lerp_(parts[d].detach().var(0), 0.1)
            elif self.population == "domain":
                mean, var = self.means[bn][d], self.variances[bn][d]
            else:
                mean, var = self.running[bn]
            weight, bias = (bn.weight, bn.bias) if self.affine == "shared" else (bn.domain_weight[d], bn.domain_bias[d])
            y[own] = ((x[own].movedim(1, -1) - mean) / (var + bn.eps).sqrt() * weight + bias).movedim(-1, 1)
        if bn.training:
            self.running[bn][0].lerp_(whole.detach().mean(0), 0.1)
            self.running[bn][1].lerp_(whole.detach().var(0), 0.1)
        return y


def with_gradients(output: Tensor, model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [output, *torch.autograd.grad((output * weights).sum(), wanted)]


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("row", EVERY)
def test_datasets_train_and_evaluate_as_their_row_of_table_5(row: int, per: str) -> None:
    model = net()
    handle = given(model, row)
    for layer in find_bn(model).values():
        for p in layer.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    by_hand = ByHand(model, row)
    for x, domain in BATCHES:
        if per == "batch":
            domain = torch.full_like(domain, int(domain[0]))
        x = x.clone().requires_grad_()
        with handle.use_domain(domain if per == "sample" else int(domain[0])):
            ours = with_gradients(model(x), model, x)
        assert_close(ours, with_gradients(by_hand(x, domain), model, x))
    for name, layer in find_bn(model).items():
        assert_close((layer.running_mean, layer.running_var), by_hand.running[layer])
        assert int(layer.num_batches_tracked) == len(BATCHES)
        if EVERY[row][1] == "domain":
            own = handle.state()[name]
            assert_close((own["domain_mean"], own["domain_var"]), (by_hand.means[layer], by_hand.variances[layer]))
    x, domain = BATCHES[0]
    handle.set_domain(domain)
    assert_close([model.eval()(x)], [by_hand(x, domain)])
    handle.undo()
    assert [type(m) for m in model] == [type(m) for m in net()]


@pytest.mark.parametrize("row", [1, 2, 4])
def test_a_pass_measures_each_domain_of_mixed_batches_as_one(row: int) -> None:
    """In lockstep, of batches that hold different domains, one of them none of some."""
    model = net()
    handle = given(model, row)

    def forward(model: nn.Module, batch: Any) -> None:
        with handle.use_domain(batch[1]):
            model(batch[0])

    statistics = precise_bn(model, BATCHES, forward=forward, normalization_batch_size="population")
    x, domain = torch.cat([x for x, _ in BATCHES]), torch.cat([d for _, d in BATCHES])
    truth = ByHand(net(), row)
    truth.model.train()
    for bn in truth.means:
        bn.momentum = 1.0
    inputs: dict[str, Tensor] = {}
    for name, m in truth.model.named_children():
        inputs[name] = x
        x = truth.normalized(m, x, domain) if isinstance(m, nn.BatchNorm2d) else m(x)
    for name, layer in find_bn(model).items():
        rows = inputs[name].detach().movedim(1, -1)
        whole = rows.flatten(0, -2)
        assert_close((layer.running_mean, layer.running_var), (whole.mean(0), whole.var(0, correction=0)))
        assert statistics[name].count == len(whole)
        for d in range(3) if EVERY[row][1] == "domain" else ():
            own = rows[domain == d].flatten(0, -2)
            found = handle.state()[name]
            assert_close((found["domain_mean"][d], found["domain_var"][d]), (own.mean(0), own.var(0, correction=0)))
            assert statistics[name].domains[d].count == len(own)


def test_a_checkpointed_block_is_recomputed_as_its_domains() -> None:
    models = net(), net()
    handles = [given(m, 6) for m in models]
    x, domain = BATCHES[0]
    found = []
    for model, handle, call in zip(models, handles, (lambda m, x: m(x), checkpoint), strict=True):
        handle.set_domain(domain)
        x = x.clone().requires_grad_()
        options = {} if call is not checkpoint else {"use_reentrant": False}
        found.append(with_gradients(call(model, x, **options), model, x))
    assert_close(*found)
    assert_close(*(list(m.buffers()) for m in models))


def test_one_value_has_no_variance_and_moves_no_statistics_of_its_domain() -> None:
    layer = nn.BatchNorm1d(2)
    handle = given(layer, 2)
    with handle.use_domain(torch.tensor([0, 0, 1, 0])):
        layer(torch.randn(4, 2))
    own = handle.state()[""]
    assert own["domain_batches"].tolist() == [1, 0, 0] and own["domain_var"][1:].eq(1).all()


@pytest.mark.parametrize("row", [3, 4, 6])
def test_a_domain_of_one_value_is_refused_by_name_before_any_is_normalized(row: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    handle = given(model, row)
    before = {k: v.clone() for k, v in dict(model.named_buffers()).items()}
    x = torch.randn(4, 2)
    with handle.use_domain(torch.tensor([0, 0, 1, 0])):
        with pytest.raises(ValueError, match="Layer '0' gets one value per channel of domain 1"):
            model(x)
        assert all(v.equal(before[k]) for k, v in model.named_buffers())
        model.eval()(x)  # which needs no second value


def test_what_is_no_domain_is_refused() -> None:
    model = net()
    handle = given(model, 4)
    x, domain = BATCHES[0]
    with pytest.raises(RuntimeError, match="No domain is set"):
        model(x)
    for wrong, error in ((3, ValueError), (-1, ValueError), (torch.tensor([0, 5]), ValueError), ("a", TypeError),
                         (domain.double(), TypeError), (True, TypeError)):  # fmt: skip
        with pytest.raises(error, match=r"[Dd]omain"), handle.use_domain(wrong):
            pass
    with (
        handle.use_domain(domain[:2]),
        pytest.raises(ValueError, match=r"Layer '1' gets 5 rows, but .* of 2 samples"),
    ):
        model(x)
    levels = domain_bn(nn.Sequential(net()), num_domains=2, level_modules="0", **choices(4))
    with pytest.raises(ValueError, match="feature levels"):
        levels.set_domain(1)


def test_the_state_goes_back_into_another_model() -> None:
    first, second = net(), net()
    trained, anew = given(first, 4), given(second, 4)
    x, ids = batch(0, [0, 1, 1, 0, 1, 0])
    with trained.use_domain(ids):
        first(x)
    anew.load(trained.state())
    for name, own in trained.state().items():
        assert all(torch.equal(value, anew.state()[name][key]) for key, value in own.items())
    with pytest.raises(ValueError, match="state has no statistics of domains"):
        anew.load({})
