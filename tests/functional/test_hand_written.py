"""The law of BatchNorm layers that people write themselves: the right number, or a refusal by name with a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import adapt_bn, batch_leakage, ghost_bn, mini_batch_inference, precise_bn
from tests.hand_written import TRUE, UNTOLD, ZOO, Net, batches, state, truth
from tests.truth import assert_close_to, assert_stored

SIGMA = VAR = 1e-5
BATCH_SIZES = {None: 1, 4: 2, "population": 6}
"""How many of the batches are normalized together."""
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
    statistics = precise_bn(net, data, batch_size=batch_size)
    assert_close_to(statistics, expected, SIGMA, VAR)
    assert_stored(net, statistics)
    assert state(net) == before


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", UNTOLD)
def test_what_cannot_be_seen_is_refused_by_name(name: str, batch_size: Any) -> None:
    net, data = trained(name), batches([2, 2, 4, 4])
    before, stored = state(net), statistics_of(net)
    with pytest.raises(TypeError, match=WAY_OUT):
        precise_bn(net, data, batch_size=batch_size)
    assert state(net) == before
    assert all(torch.equal(v, stored[k]) for k, v in statistics_of(net).items())
    assert list(precise_bn(net, data, batch_size=batch_size, layers="last")) == ["last"], "the way out"


@pytest.mark.parametrize("name", TRUE)
def test_an_empty_batch_is_skipped_wherever_it_stands(name: str) -> None:
    net, data = trained(name), batches()
    expected = truth(net, [[x] for x in data])
    statistics = precise_bn(net, [data[0][:0], *data, data[0][:0]])
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
