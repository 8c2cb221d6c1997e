"""WarmUp: the next steps use 1/n, 2/n, ... of the learning rate, which is scaled only inside the steps.

The reference is a loop that scales the scheduler's learning rates by hand.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_bn.functional.warm_up import WarmUp

STEPS = 12

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD, momentum and decay": lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "Adam, tensor lr": lambda p: Adam(p, lr=torch.tensor(0.1), capturable=False, foreach=False),
    "SGD, two groups": lambda p: SGD([{"params": [w], "lr": 0.5 / (i + 1)} for i, w in enumerate(p)], lr=1.0),
}

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda o: None,
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.5, total_steps=STEPS),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (step + 1)),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, factor=0.3),
    "chain": lambda o: schedulers.ChainedScheduler([schedulers.ExponentialLR(o, 0.9), schedulers.LinearLR(o, 0.2)]),
}


def weights() -> list[nn.Parameter]:
    own = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(3, generator=own)) for _ in range(2)]


def set_gradients(optimizer: Optimizer) -> None:
    """Of a quadratic with its minimum at 1: they depend on the weights, so one wrong step shows in all later ones."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.detach() - 1


def assert_same_weights(a: Optimizer, b: Optimizer) -> None:
    for one, other in zip(a.param_groups, b.param_groups, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one["params"], other["params"], strict=True))


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def advance(scheduler: Any) -> None:
    """ReduceLROnPlateau gets a metric that never improves: it cuts the rate at every other step."""
    if scheduler:
        scheduler.step(*[1.0] * isinstance(scheduler, schedulers.ReduceLROnPlateau))


def step_by_hand(optimizer: Optimizer, scheduler: Any, factor: float = 1.0) -> None:
    """The reference: set the scaled rate before the step, and restore the scheduler's after it."""
    own = [copy.deepcopy(group["lr"]) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = rate * factor
    step(optimizer)
    for group, rate in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = rate
    advance(scheduler)


def step(optimizer: Optimizer) -> None:
    set_gradients(optimizer)
    optimizer.step()


def failing_step(optimizer: Optimizer) -> None:
    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)


@settings(max_examples=60)
@given(
    st.sampled_from(list(OPTIMIZERS)),
    st.sampled_from(list(SCHEDULERS)),
    st.lists(st.sampled_from(["step", "step", "step", "failing step", "begin 4", "begin 2", "undo"]), max_size=10),
)
@example("AdamW", "OneCycleLR", ["begin 4", *["step"] * 8])
@example("SGD, momentum and decay", "none", ["begin 2", "step", "begin 4", "step", "failing step", "step", "undo"])
def test_steps_are_those_of_rates_that_are_scaled_by_hand(name: str, schedule: str, events: list[str]) -> None:
    ours, truth = OPTIMIZERS[name](weights()), OPTIMIZERS[name](weights())
    scheduler, by_hand = SCHEDULERS[schedule](ours), SCHEDULERS[schedule](truth)
    active: list[tuple[WarmUp, int]] = []
    for event in events:
        if event.startswith("begin"):
            active.append((WarmUp([ours], int(event[-1])), int(event[-1])))
        elif event == "undo" and active:
            active.pop()[0].undo()
        elif event == "failing step":
            failing_step(ours)
        elif event == "step":
            factor = min([1.0, *((warm_up.done[0] + 1) / steps for warm_up, steps in active)])
            step(ours)
            advance(scheduler)
            step_by_hand(truth, by_hand, factor)
            assert rates(ours) == rates(truth)
            assert_same_weights(ours, truth)
    for warm_up, _ in active:
        warm_up.undo()
    assert rates(ours) == rates(truth), "also after a step that raised, behind which torch runs no hook"


def test_each_optimizer_counts_its_own_steps_and_a_warm_up_continues_an_earlier_one() -> None:
    often, rarely = SGD(weights(), lr=1.0), SGD(weights(), lr=1.0)
    first = WarmUp([often, rarely], 4)
    for optimizer in (often, rarely, often):
        step(optimizer)
    assert first.done == [2, 1] and (first.factor(0), first.factor(1)) == (0.75, 0.5)
    first.undo()
    first.undo()
    second = WarmUp([often, rarely], 4, first.done)
    for _ in range(3):
        step(often)
    assert (second.factor(0), second.factor(1)) == (1.0, 0.5)
    assert first.done == [2, 1] and second.done == [5, 1], "the second one has a copy"
    assert WarmUp([often], 0).factor(0) == 1.0


def test_a_tensor_rate_stays_the_object_that_groups_share_and_is_scaled_once() -> None:
    rate, seen = torch.tensor(0.8), []
    optimizer = SGD([{"params": [w]} for w in weights()], lr=0.8)
    for group in optimizer.param_groups:
        group["lr"] = rate
    WarmUp([optimizer], 4)
    optimizer.register_step_pre_hook(lambda *_: seen.append(rates(optimizer)))
    step(optimizer)
    assert seen == [pytest.approx([0.2, 0.2])]
    assert all(group["lr"] is rate for group in optimizer.param_groups) and rate == torch.tensor(0.8)
