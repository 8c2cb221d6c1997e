"""Steps are kept and taken in together; the truth is what the layers were given, and the formula a step at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.tracking import step_forecast
from lightning_bn.tracking.step_forecast import AT_ONCE, StatisticsForecaster
from tests.core.test_forecast import Stepwise, assert_equal_to_rounding

SIZES = [3, 2, 4]
STEPS = 2 * AT_ONCE + 9


def layers_of() -> dict[str, nn.BatchNorm1d]:
    return {str(i): nn.BatchNorm1d(size).double() for i, size in enumerate(SIZES)}


def running_of(layers: dict[str, nn.BatchNorm1d]) -> Tensor:
    return torch.stack([torch.cat([getattr(bn, f"running_{kind}") for bn in layers.values()]) for kind in MOMENTS])


MOMENTS = ("mean", "var")


@pytest.mark.parametrize("at_once", [1, 5, 100], ids="{} channels at a time".format)
@pytest.mark.parametrize("asked", [1, 7, STEPS], ids="asked every {} steps".format)
def test_whenever_it_is_asked_it_has_seen_what_the_layers_were_given(
    asked: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others write in between, a layer rests, and a momentum changes."""
    monkeypatch.setattr(step_forecast, "_CHANNELS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    layers = layers_of()
    watched, truth = StatisticsForecaster(layers), Stepwise(SIZES)
    for step in range(STEPS):
        if step == 20:
            layers["0"].momentum = 0.3
        if step % 10 == 9:
            layers["2"].running_mean.data.add_(0.5)  # of which no version tells
        rows = [0.03 * step + torch.randn(8, n, generator=generator, dtype=torch.float64) for n in SIZES]
        rests = step % 4 == 0
        before = running_of(layers)
        watched.before_batch()
        for number, (bn, x) in enumerate(zip(layers.values(), rows, strict=True)):
            if not (rests and number == 1):
                bn(x)
        watched.after_batch()
        given = torch.stack([torch.cat([getattr(x, kind)(0) for x in rows]) for kind in MOMENTS])
        called = torch.tensor([True] * 3 + [not rests] * 2 + [True] * 4)
        truth.update(given, before, called)
        if step % asked == asked - 1:
            watched.statistics()
    assert_equal_to_rounding(watched.state_dict(), truth)


def test_a_step_that_never_ended_is_left_out() -> None:
    layers = layers_of()
    watched = StatisticsForecaster(layers)
    for ends in (True, False, True):
        watched.before_batch()
        for bn in layers.values():
            bn(torch.randn(8, bn.num_features).double())
        if ends:
            watched.after_batch()
    assert watched.state_dict()["steps"].tolist() == [2.0] * sum(SIZES)


def test_no_more_steps_are_kept_than_is_said() -> None:
    layers = layers_of()
    watched = StatisticsForecaster(layers)
    kept = []
    for _ in range(STEPS):
        watched.before_batch()
        watched.after_batch()
        kept.append(len(watched._pending))
    assert max(kept) == AT_ONCE - 1
