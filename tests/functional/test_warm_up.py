"""The warm-up is there inside a step and nowhere else, so schedulers never see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bn.functional.warm_up import WarmUp


class Recorded(torch.optim.SGD):
    """Keeps the learning rate of each step."""

    def __init__(self, lr: float | Tensor) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        self.rates: list[float] = []

    def step(self, closure: object = None) -> None:
        self.rates.append(float(self.param_groups[0]["lr"]))
        if closure is not None:
            raise OSError


def test_rates_rise_linearly_to_what_they_are_without_it() -> None:
    sgd = Recorded(0.8)
    WarmUp([sgd], steps=4)
    for _ in range(6):
        sgd.step()
        assert sgd.param_groups[0]["lr"] == 0.8, "between steps it is what it was"
    assert sgd.rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_chainable_schedulers_stay_exact() -> None:
    plain, warmed = Recorded(0.4), Recorded(0.4)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10) for o in (plain, warmed)]
    WarmUp([warmed], steps=3)
    for step in range(8):
        for optimizer, scheduler in zip((plain, warmed), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        assert warmed.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        assert warmed.rates[step] == pytest.approx(plain.rates[step] * min(1, (step + 1) / 3))


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.8)
    sgd = Recorded(rate)
    WarmUp([sgd], steps=2)
    sgd.step()
    assert sgd.rates == [pytest.approx(0.4)]
    assert sgd.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.8)


def test_each_optimizer_counts_its_own_steps_and_goes_on_where_it_was() -> None:
    first, second = Recorded(1.0), Recorded(1.0)
    warm_up = WarmUp([first, second], steps=4)
    for optimizer in (first, first, second):
        optimizer.step()
    assert warm_up.done == [2, 1]
    warm_up.undo()
    resumed = WarmUp([first, second], steps=4, done=warm_up.done)
    assert [resumed.factor(0), resumed.factor(1)] == [0.75, 0.5]
    first.step()
    second.step()
    assert first.rates[-1] == 0.75 and second.rates[-1] == 0.5


def test_a_step_that_raises_leaves_nothing_scaled_for_long() -> None:
    sgd = Recorded(1.0)
    warm_up = WarmUp([sgd], steps=2)
    with pytest.raises(OSError):
        sgd.step(lambda: None)
    sgd.step()
    assert sgd.rates == [0.5, 0.5], "scaled once, not twice, and not counted"
    with pytest.raises(OSError):
        sgd.step(lambda: None)
    warm_up.undo()
    assert sgd.param_groups[0]["lr"] == 1.0
    sgd.step()
    assert sgd.rates[-1] == 1.0, "no hook is left"


def test_no_steps_are_no_warm_up() -> None:
    sgd = Recorded(1.0)
    WarmUp([sgd], steps=0)
    sgd.step()
    assert sgd.rates == [1.0]
