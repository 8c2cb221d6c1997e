"""The law of BatchNorm layers that people write themselves: the right number, or a refusal by name with a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import adapt_bn, batch_leakage, ghost_bn, mini_batch_inference, precise_bn
from tests.hand_written import (
    CHANNELS,
    LENGTH,
    TRUE,
    UNTOLD,
    ZOO,
    ByHand,
    HandWritten,
    Net,
    batches,
    oracle,
    state,
    truth,
)
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
    """A net of the zoo whose stored statistics are its own."""
    net = Net(ZOO[name]).train()
    for layer in net.modules():
        if isinstance(layer, _BatchNorm):
            for key in ("running_mean", "running_var"):
                getattr(layer, key).uniform_(0.5, 1.5)
    return net


def statistics_of(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items() if "running_" in k}


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", TRUE)
def test_precise_bn_measures_what_batch_norm_normalizes(name: str, batch_size: Any) -> None:
    net, data, size = trained(name), batches(), BATCH_SIZES[batch_size]
    expected = truth(net, [data[i : i + size] for i in range(0, len(data), size)])
    before = state(net)
    statistics = precise_bn(net, data, normalization_batch_size=batch_size)
    assert_close_to(statistics, expected, SIGMA, VAR)
    assert_stored(net, statistics)
    assert state(net) == before


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", UNTOLD)
def test_what_cannot_be_seen_is_refused_by_name(name: str, batch_size: Any) -> None:
    net, data = trained(name), batches([2, 2, 4, 4])
    before, stored = state(net), statistics_of(net)
    with pytest.raises(TypeError, match=WAY_OUT):
        precise_bn(net, data, normalization_batch_size=batch_size)
    assert state(net) == before
    assert all(torch.equal(v, stored[k]) for k, v in statistics_of(net).items())
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


@pytest.mark.parametrize("name", TRUE)
def test_an_empty_batch_is_skipped_wherever_it_stands(name: str) -> None:
    net, data = trained(name), batches()
    expected = truth(net, [[x] for x in data])
    statistics = precise_bn(net, [data[0][:0], *data, data[0][:0]], normalization_batch_size="loader")
    assert_close_to(statistics, expected, SIGMA, VAR)


@pytest.mark.parametrize("name", ZOO)
def test_adapt_bn_measures_what_is_normalized_in_evaluation(name: str) -> None:
    net, data = trained(name).eval(), batches([4, 4, 2])
    before, stored = state(net), statistics_of(net)
    if ZOO[name].in_eval is None:
        with pytest.raises(TypeError, match=WAY_OUT):
            adapt_bn(net, data)
    else:
        expected = truth(net, [[x] for x in data], in_eval=True)
        with adapt_bn(net, data) as adaptation:
            assert_close_to(adaptation.statistics, expected, SIGMA, VAR)
    assert state(net) == before
    assert all(torch.equal(v, stored[k]) for k, v in statistics_of(net).items())


@pytest.mark.parametrize("name", ZOO)
def test_mini_batch_inference_normalizes_what_batch_norm_is_given_by_itself(name: str) -> None:
    net, (x,) = trained(name).eval(), batches([4])
    before, stored = state(net), statistics_of(net)
    like_it = {**ZOO[name]._asdict(), "in_eval": ZOO[name].in_eval or "BatchNorm2d"}
    with mini_batch_inference(net), torch.no_grad():
        if ZOO[name].is_seen:
            net.entry = HandWritten(**like_it)
            torch.testing.assert_close(net(x).double(), oracle(net, in_eval=True)(x.double()), rtol=0, atol=1e-4)
        else:
            with pytest.raises(TypeError, match=WAY_OUT):
                net(x)
    assert state(net) == before
    assert all(torch.equal(v, stored[k]) for k, v in statistics_of(net).items())


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
def test_the_leakage_test_reads_what_batch_norm_is_given_or_leaves_the_layer_out(
    name: str, plain_leakage: tuple[Net, list[Tensor], float]
) -> None:
    net, (plain, data, expected) = trained(name).eval(), plain_leakage
    net.inside.load_state_dict(plain.inside.state_dict())
    before, stored = state(net), statistics_of(net)
    found = batch_leakage(net, data)
    if not ZOO[name].is_seen:
        assert "does not call" in found.left_out["bn"]
    elif name in SEVERAL_ROWS:
        assert "rows" in found.left_out["bn"]
    elif name != "a child":
        assert found.icc["bn"] == pytest.approx(expected, abs=1e-4) and not found.left_out
    assert state(net) == before
    assert all(torch.equal(v, stored[k]) for k, v in statistics_of(net).items())
