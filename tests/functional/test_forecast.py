"""The forecaster recovers what layers were given and forecasts from the last steps of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.tracking.forecast import STEPS, StatisticsForecaster, Steps, forecast_statistics

SIZES = [3, 2, 4]


def layers_of() -> dict[str, nn.BatchNorm1d]:
    return {str(i): nn.BatchNorm1d(size).double() for i, size in enumerate(SIZES)}


def running_of(layers: dict[str, nn.BatchNorm1d]) -> Tensor:
    return torch.stack([torch.cat([getattr(bn, f"running_{m}") for bn in layers.values()]) for m in ("mean", "var")])


def run(layers: dict[str, nn.BatchNorm1d], *watching: StatisticsForecaster, start: int = 0, steps: int = 1) -> Steps:
    """Some steps: the second layer rests in every fourth, others write in between, a momentum changes."""
    generator = torch.Generator().manual_seed(start)
    batches, before, called = [], [], []
    for step in range(start, start + steps):
        layers["0"].momentum = 0.3 if step >= 20 else 0.1
        if step % 10 == 9:
            layers["2"].running_mean.data.add_(0.5)  # of which no version tells
        rows = [0.03 * step + torch.randn(8, n, generator=generator, dtype=torch.float64) for n in SIZES]
        rests = step % 4 == 0
        before.append(running_of(layers))
        for each in watching:
            each.before_batch()
        for number, (bn, x) in enumerate(zip(layers.values(), rows, strict=True)):
            if not (rests and number == 1):
                bn(x)
        for each in watching:
            each.after_batch()
        batches.append(torch.stack([torch.cat([getattr(x, kind)(0) for x in rows]) for kind in ("mean", "var")]))
        called.append(torch.tensor([True] * 3 + [not rests] * 2 + [True] * 4))
    return Steps(torch.stack(batches), torch.stack(before), torch.stack(called))


@pytest.mark.parametrize("at_once", [1, 5, 100], ids="{} channels at a time".format)
def test_whenever_it_is_asked_it_has_seen_what_the_layers_were_given(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_bn.tracking.forecast._CHANNELS_AT_ONCE", at_once)
    layers = layers_of()
    watched, parts = StatisticsForecaster(layers), []
    for start in range(0, 2 * STEPS, 8):
        parts.append(run(layers, watched, start=start, steps=8))
        steps = Steps(*(torch.cat(values)[-STEPS:] for values in zip(*parts, strict=True)))
        truth = forecast_statistics(steps, running_of(layers), torch.full((9,), 1e-5).double(), SIZES)
        found = watched.statistics()
        for name, mean, var in zip(layers, truth.mean.split(SIZES), truth.var.split(SIZES), strict=True):
            torch.testing.assert_close(found[name].mean, mean, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(found[name].var, var, rtol=1e-6, atol=1e-8)


def test_a_step_that_never_ended_is_left_out() -> None:
    layers = layers_of()
    watched = StatisticsForecaster(layers)
    for ends in (True, False, True):
        watched.before_batch()
        for bn in layers.values():
            bn(torch.randn(8, bn.num_features).double())
        if ends:
            watched.after_batch()
    assert len(watched.state_dict()["steps"]) == 2


def test_it_continues_from_its_state_and_keeps_no_more_steps_than_documented() -> None:
    layers = layers_of()
    whole, resumed = StatisticsForecaster(layers), StatisticsForecaster(layers)
    run(layers, whole, steps=STEPS + 3)
    assert len(whole.state_dict()["steps"]) == STEPS
    resumed.load_state_dict(whole.state_dict())
    run(layers, whole, resumed, start=STEPS + 3, steps=5)
    for name, found in whole.statistics().items():
        assert torch.equal(found.mean, resumed.statistics()[name].mean)
        assert torch.equal(found.var, resumed.statistics()[name].var)


def test_the_state_of_other_layers_is_refused_and_nothing_taken() -> None:
    layers = layers_of()
    watched, others = StatisticsForecaster(layers), StatisticsForecaster({"0": layers["0"]})
    run(layers, watched, steps=3)
    with pytest.raises(ValueError, match="the layers were others"):
        others.load_state_dict(watched.state_dict())
    assert not others.state_dict()["steps"]


def test_written_statistics_are_compared_anew() -> None:
    layers = layers_of()
    watched = StatisticsForecaster(layers)
    run(layers, watched, steps=8)
    gaps = watched.ema_gaps()
    layers["1"].running_mean.fill_(torch.nan)
    written = watched.ema_gaps()
    assert math.isnan(written["1"]) and written["0"] == gaps["0"] > 0
