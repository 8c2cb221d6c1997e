"""The law of BatchNorm layers that people write themselves: the right number, or a refusal by name with a way out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import adapt_bn, batch_leakage, ghost_bn, mini_batch_inference, precise_bn
from tests import zoo
from tests.functional.domains import add_domains
from tests.hand_written import CHANNELS, LENGTH, TRUE, UNTOLD, ZOO, ByHand, Net, batches, oracle, state, truth
from tests.truth import assert_close_to, assert_stored, rows_of

SIGMA = VAR = 1e-5
BATCH_SIZES = {"loader": 1, 4: 2, "population": 6}
"""How many of the batches are normalized together."""
WITH_GHOSTS = [name for name in ZOO if "masked" not in name and "Sync" not in name]
"""Rows without padding are not so many of each sample, and SyncBatchNorm does not train on the CPU."""
SEVERAL_ROWS = ("masked", "masked, arguments by name", "two halves")
"""Whose are which cannot be told."""
WAY_OUT = r"'bn'.*layers="


def trained(name: str) -> Net:
    return zoo.trained(Net(ZOO[name]).train(), affine=False)


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    before, stored = state(net), {k: v.clone() for k, v in net.state_dict().items()}
    yield
    assert state(net) == before
    assert all(torch.equal(v, stored[k]) for k, v in net.state_dict().items() if "running_" in k)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", TRUE)
def test_precise_bn_measures_what_batch_norm_normalizes(name: str, batch_size: Any) -> None:
    net, data, size = trained(name), batches(), BATCH_SIZES[batch_size]
    expected = truth(net, [data[i : i + size] for i in range(0, len(data), size)])
    before = state(net)
    if batch_size == "loader":
        data = [data[0][:0], *data, data[0][:0]]  # empty batches are skipped
    statistics = precise_bn(net, data, normalization_batch_size=batch_size)
    assert_close_to(statistics, expected, SIGMA, VAR)
    assert_stored(net, statistics)
    assert state(net) == before


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", UNTOLD)
def test_what_cannot_be_seen_is_refused_by_name(name: str, batch_size: Any) -> None:
    net, data = trained(name), batches([2, 2, 4, 4])
    with unchanged(net), pytest.raises(TypeError, match=WAY_OUT):
        precise_bn(net, data, normalization_batch_size=batch_size)
    assert list(precise_bn(net, data, normalization_batch_size=batch_size, layers="last")) == ["last"], "the way out"


def test_a_child_that_is_not_chosen_is_not_taken_for_its_parent() -> None:
    net, data = trained("timm SplitBatchNorm2d"), batches()
    statistics = precise_bn(net, data, layers="bn", normalization_batch_size="loader")
    assert_close_to(statistics, {"bn": truth(net, [[x] for x in data])["bn"]}, SIGMA, VAR)


@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 300), (torch.float64, 1e4)]
)
def test_rounding_is_no_reason_to_refuse(dtype: torch.dtype, mean: float) -> None:
    bn = ByHand(CHANNELS).to(dtype)
    data = [(torch.randn(8, CHANNELS, LENGTH) + mean).to(dtype) for _ in range(3)]
    statistics = precise_bn(bn, data, normalization_batch_size="loader")
    assert_close_to(statistics, {"": torch.cat([rows_of(x) for x in data])}, 1e-4, 1e-3)


@pytest.mark.parametrize("name", ZOO)
def test_adapt_bn_measures_what_is_normalized_in_evaluation(name: str) -> None:
    net, data = trained(name).eval(), batches([4, 4, 2])
    with unchanged(net):
        if ZOO[name].in_eval is None:
            with pytest.raises(TypeError, match=WAY_OUT):
                adapt_bn(net, data)
        else:
            expected = truth(net, [[x] for x in data], in_eval=True)
            with adapt_bn(net, data) as adaptation:
                assert_close_to(adaptation.statistics, expected, SIGMA, VAR)


@pytest.mark.parametrize("name", ZOO)
def test_mini_batch_inference_normalizes_what_batch_norm_is_given_by_itself(name: str) -> None:
    net, (x,) = trained(name).eval(), batches([4])
    with unchanged(net), mini_batch_inference(net), torch.no_grad():
        if ZOO[name].is_seen:
            net.entry = ZOO[name]._replace(in_eval=ZOO[name].in_eval or "BatchNorm2d")
            torch.testing.assert_close(net(x).double(), oracle(net, in_eval=True)(x.double()), rtol=0, atol=1e-4)
        else:
            with pytest.raises(TypeError, match=WAY_OUT):
                net(x)


@pytest.mark.parametrize("name", WITH_GHOSTS)
def test_ghosts_are_groups_of_what_batch_norm_is_given(name: str) -> None:
    net, (x,) = trained(name), batches([8])
    h, entry = net.inside(x).detach(), ZOO[name]
    with ghost_bn(net, splits=2, grouping="contiguous"), torch.no_grad():
        if not entry.is_seen:
            with pytest.raises(TypeError, match=WAY_OUT):
                entry.use(net.bn, h, x)
            return
        y = entry.use(net.bn, h, x)
    twin = oracle(net)
    if entry.parts > 1:  # each has its own ghosts, and is plain itself
        twin.bn.__class__ = nn.BatchNorm2d if entry.in_eval == "BatchNorm2d" else nn.BatchNorm1d
    parts = [
        entry.use(twin.bn, *pair) for pair in zip(*(v.double().chunk(2 * entry.parts) for v in (h, x)), strict=True)
    ]
    torch.testing.assert_close(y.double(), torch.cat(parts), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain_leakage() -> tuple[Net, list[Tensor], float]:
    """A net without hand-written layers, data, and what the leakage test finds of its first layer."""
    torch.manual_seed(0)
    net, data = trained("plain").eval(), [torch.randn(4, 3, LENGTH) for _ in range(12)]
    return net, data, batch_leakage(net, data).icc["bn"]


@pytest.mark.parametrize("name", ZOO)
def test_the_leakage_test_reads_what_batch_norm_is_given_or_leaves_the_layer_out(name: str, plain_leakage: Any) -> None:
    net, (plain, data, expected) = trained(name).eval(), plain_leakage
    net.inside.load_state_dict(plain.inside.state_dict())
    with unchanged(net):
        found = batch_leakage(net, data)
    if not ZOO[name].is_seen:
        assert "does not call" in found.left_out["bn"]
    elif name in SEVERAL_ROWS:
        assert "rows" in found.left_out["bn"]
    elif name != "a child":
        assert found.icc["bn"] == pytest.approx(expected, abs=1e-4) and not found.left_out


RESHAPED = [
    *("transposed", "rows", "padded", "masked", "masked, arguments by name", "container", "counts itself"),
    *("BatchNorm2d", "timm BatchNormAct2d", "torch.batch_norm", "own statistics, in place"),
]
"""Layers of one call, which keep torch's conventions or have us keep them."""
MIXED = ["plain", "transposed", "padded", "BatchNorm2d", "timm BatchNormAct2d", "torch.batch_norm"]
"""Those that a batch of several domains goes into, sample by sample."""
either = pytest.mark.parametrize("row", [2, 4])


class Single(nn.Module):
    def __init__(self, entry: Any) -> None:
        super().__init__()
        self.entry, self.inside, self.bn = entry, nn.Conv1d(3, CHANNELS, 1), entry.make(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.entry.use(self.bn, self.inside(x), x)


def train(model: nn.Module, data: list[tuple[Tensor, int]], handle: Any) -> None:
    for x, domain in data:
        with handle.use_domain(domain):
            model(x)


def rows_given(net: Single, data: list[Tensor]) -> Tensor:
    """What the layer's call is given of some batches, ``(count, C)``."""
    assert net.entry.given is not None
    found = [net.entry.given(net.inside(x), x)[""] for x in data]
    return torch.cat([rows for calls in found for rows in calls]).detach()


def assert_own(handle: Any, domain: int, mean: Tensor, var: Tensor) -> None:
    for key, expected in (("domain_mean", mean), ("domain_var", var)):
        found = handle.state()["bn"][key][domain].double()
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)


@either
@pytest.mark.parametrize("name", RESHAPED)
def test_a_domains_statistics_are_those_of_what_its_calls_were_given(name: str, row: int) -> None:
    net = Single(ZOO[name]).train()
    data = [(x, i % 2) for i, x in enumerate(batches([4, 6, 4, 6, 8]))]
    truth = {d: (torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()) for d in (0, 1)}
    for x, d in data:
        rows, (mean, var) = rows_given(net, [x]), truth[d]
        truth[d] = mean.lerp(rows.mean(0), 0.1), var.lerp(rows.var(0), 0.1)
    handle = add_domains(net, row)
    train(net, data, handle)
    for domain, moments in truth.items():
        assert_own(handle, domain, *moments)
    assert handle.state()["bn"]["domain_batches"].tolist() == [3, 2, 0]


@either
@pytest.mark.parametrize("name", MIXED)
def test_samples_of_several_domains_are_told_apart_at_the_call(name: str, row: int) -> None:
    net = Single(ZOO[name]).train()
    domain, (x,) = torch.tensor([0, 1, 1, 0, 0, 1]), batches([6])
    handle = add_domains(net, row)
    train(net, [(x, domain)], handle)
    for d in (0, 1):
        rows = rows_given(net, [x[domain == d]])
        assert_own(handle, d, 0.1 * rows.mean(0), 0.9 + 0.1 * rows.var(0))


@pytest.mark.parametrize(("row", "name"), [(2, "rows"), (2, "masked"), (2, "container"), (4, "container")])
def test_what_is_mixed_up_before_the_call_is_refused_by_name(row: int, name: str) -> None:
    net, (x,) = Single(ZOO[name]).train(), batches([4])
    handle = add_domains(net, row)
    with pytest.raises((TypeError, ValueError), match=r"'bn'.*layers="):
        train(net, [(x, torch.tensor([0, 1, 1, 0]))], handle)
    train(net, [(x, 1)], handle)


@either
@pytest.mark.parametrize("name", [name for name in [*TRUE, *UNTOLD] if not ZOO[name].is_seen])
def test_a_hand_written_layer_is_refused_by_name_and_the_way_out_works(name: str, row: int) -> None:
    net, data = Net(ZOO[name]).train(), [(batches([4])[0], 0)]
    with add_domains(net, row) as handle, pytest.raises(TypeError, match=r"'bn' does not call .*layers="):
        train(net, data, handle)
    handle = add_domains(net, row, layers="last")
    train(net, data, handle)
    assert handle.state()["last"]["domain_batches"].tolist() == [1, 0, 0]
