"""WarmUp: the next steps use 1/n, 2/n, ... of the learning rate, which is scaled only inside the steps.

The reference is a loop that scales the scheduler's learning rates by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_bn.functional.warm_up import WarmUp

STEPS, WARM_UP = 8, 4

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD, momentum and decay": lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "Adam, tensor lr": lambda p: Adam(p, lr=torch.tensor(0.1), capturable=False, foreach=False),
    "SGD, two groups": lambda p: SGD([{"params": [w], "lr": 0.5 / (i + 1)} for i, w in enumerate(p)], lr=1.0),
}

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda optimizer: None,
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=0.5, total_steps=STEPS),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "ReduceLROnPlateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.3),
    "chain of two": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(optimizer, 0.9), schedulers.LinearLR(optimizer, 0.2, total_iters=3)]
    ),
}

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
optimizers_and_schedulers = pytest.mark.parametrize(
    ("make", "schedule"),
    [
        *((make, SCHEDULERS["OneCycleLR"]) for make in OPTIMIZERS.values()),
        *((OPTIMIZERS["AdamW"], schedule) for schedule in SCHEDULERS.values()),
        (OPTIMIZERS["Adam, tensor lr"], SCHEDULERS["ReduceLROnPlateau"]),
    ],
)


def weights() -> list[nn.Parameter]:
    own = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(3, generator=own)) for _ in range(2)]


def set_gradients(optimizer: Optimizer) -> None:
    """Of a quadratic with its minimum at 1: they depend on the weights, so one wrong step shows in all later ones."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.detach() - 1


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def advance(scheduler: Any) -> None:
    """ReduceLROnPlateau gets a metric that never improves: it cuts the rate at every other step."""
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(1.0)
    elif scheduler is not None:
        scheduler.step()


def train(optimizer: Optimizer, scheduler: Any, steps: int) -> list[list[float]]:
    """The learning rates seen between steps."""
    seen = [rates(optimizer)]
    for _ in range(steps):
        set_gradients(optimizer)
        optimizer.step()
        seen.append(rates(optimizer))
        advance(scheduler)
        seen.append(rates(optimizer))
    return seen


def train_by_hand(optimizer: Optimizer, scheduler: Any, factors: list[float]) -> None:
    """The reference: set the scaled rate before each step, and restore the scheduler's after it."""
    for factor in factors:
        own = [copy.deepcopy(group["lr"]) for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate * factor
        set_gradients(optimizer)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate
        advance(scheduler)


@optimizers_and_schedulers
def test_steps_are_those_of_rates_scaled_by_hand(
    make: Callable[[Any], Optimizer], schedule: Callable[[Optimizer], Any]
) -> None:
    ours, truth = weights(), weights()
    optimizer, by_hand = make(ours), make(truth)
    scheduler, scheduler_by_hand = schedule(optimizer), schedule(by_hand)
    WarmUp([optimizer], WARM_UP)
    train(optimizer, scheduler, STEPS)
    train_by_hand(by_hand, scheduler_by_hand, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a, b)


@optimizers_and_schedulers
def test_the_scheduler_s_rates_between_steps_are_those_without_a_warm_up(
    make: Callable[[Any], Optimizer], schedule: Callable[[Optimizer], Any]
) -> None:
    optimizer, plain = make(weights()), make(weights())
    scheduler, plain_scheduler = schedule(optimizer), schedule(plain)
    WarmUp([optimizer], WARM_UP)
    assert train(optimizer, scheduler, STEPS) == train(plain, plain_scheduler, STEPS)


def test_each_optimizer_counts_its_own_steps() -> None:
    often, rarely = SGD(weights(), lr=1.0), SGD(weights(), lr=1.0)
    warm_up = WarmUp([often, rarely], 4)
    train(often, None, 3)
    train(rarely, None, 1)
    assert warm_up.done == [3, 1]
    assert (warm_up.factor(0), warm_up.factor(1)) == (1.0, 0.5)
    train(rarely, None, 3)
    train(often, None, 3)
    assert warm_up.done == [6, 4] and warm_up.factor(0) == 1.0


@every_optimizer
def test_with_two_on_one_optimizer_the_smallest_factor_applies(make: Callable[[Any], Optimizer]) -> None:
    ours, truth = weights(), weights()
    optimizer, by_hand = make(ours), make(truth)
    own = rates(optimizer)
    WarmUp([optimizer], 2)
    train(optimizer, None, 1)
    second = WarmUp([optimizer], 4)
    train(optimizer, None, 2)
    failing_step(optimizer)
    train(optimizer, None, 1)
    second.undo()
    train(optimizer, None, 1)
    train_by_hand(by_hand, None, [0.5, 0.25, 0.5, 0.75, 1.0])
    assert rates(optimizer) == own
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a, b)


def test_a_tensor_rate_stays_the_object_that_others_hold() -> None:
    rate = torch.tensor(0.5)
    optimizer = SGD(weights(), lr=rate, foreach=False)
    optimizer.param_groups[0]["lr"] = rate
    WarmUp([optimizer], 4)
    train(optimizer, None, 1)
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.5


def test_two_groups_that_share_one_tensor_rate_are_scaled_once() -> None:
    rate, seen = torch.tensor(0.8), []
    optimizer = SGD([{"params": [w]} for w in weights()], lr=0.8)
    for group in optimizer.param_groups:
        group["lr"] = rate
    WarmUp([optimizer], 4)
    optimizer.register_step_pre_hook(lambda *_: seen.append(rates(optimizer)))
    train(optimizer, None, 1)
    assert seen == [pytest.approx([0.2, 0.2])]
    assert rate == torch.tensor(0.8)


class Stop(Exception):
    """Raised inside a step."""


def failing_step(optimizer: Optimizer) -> None:
    def closure() -> float:
        raise Stop

    with pytest.raises(Stop):
        optimizer.step(closure)


@every_optimizer
def test_a_step_that_raises_leaves_no_scaled_rate_once_undone(make: Callable[[Any], Optimizer]) -> None:
    optimizer = make(weights())
    before = rates(optimizer)
    warm_up = WarmUp([optimizer], 4)
    failing_step(optimizer)
    assert rates(optimizer) != before  # torch runs no post-hook then
    warm_up.undo()
    assert rates(optimizer) == before


@every_optimizer
def test_a_step_that_raises_does_not_compound_or_count(make: Callable[[Any], Optimizer]) -> None:
    ours, truth = weights(), weights()
    optimizer, plain = make(ours), make(truth)
    before = rates(optimizer)
    WarmUp([optimizer], 4)
    failing_step(optimizer)
    train(optimizer, None, 2)
    train_by_hand(plain, None, [0.25, 0.5])
    assert rates(optimizer) == before
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a, b)


def test_a_warm_up_continues_an_earlier_one() -> None:
    ours, truth = weights(), weights()
    optimizer, other, by_hand = SGD(ours, lr=1.0), SGD(weights(), lr=1.0), SGD(truth, lr=1.0)
    first = WarmUp([optimizer, other], 4)
    train(optimizer, None, 2)
    first.undo()
    second = WarmUp([optimizer, other], 4, first.done)
    assert first.done == [2, 0] and (second.factor(0), second.factor(1)) == (0.75, 0.25)
    train(optimizer, None, 2)
    train_by_hand(by_hand, None, [0.25, 0.5, 0.75, 1.0])
    assert first.done == [2, 0]  # the second one has a copy
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a, b)


def test_after_undo_nothing_is_scaled() -> None:
    ours, truth = weights(), weights()
    optimizer, plain = SGD(ours, lr=1.0), SGD(truth, lr=1.0)
    warm_up = WarmUp([optimizer], 4)
    warm_up.undo()
    warm_up.undo()
    train(optimizer, None, 3)
    train(plain, None, 3)
    assert warm_up.done == [0]
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a, b)


def test_zero_steps_scale_nothing() -> None:
    optimizer = SGD(weights(), lr=1.0)
    seen: list[list[float]] = []
    warm_up = WarmUp([optimizer], 0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(rates(optimizer)))
    train(optimizer, None, 1)
    assert warm_up.factor(0) == 1.0 and seen == [[1.0]]
