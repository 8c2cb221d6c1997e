"""A linear learning-rate warm-up inside optimizer steps.

Step hooks scale each optimizer's learning rates right before a step and restore them right after it. Between steps
they are those of the scheduler. So any scheduler, several optimizers and manual optimization work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer


class WarmUp:
    """Scale the learning rates of the next ``steps`` steps of each optimizer by 1/steps, 2/steps, ..., 1.

    ``done`` has the steps that each has already taken in an earlier warm-up. If several warm up one optimizer, the
    smallest factor applies.
    """

    def __init__(self, optimizers: Sequence[Optimizer], steps: int, done: Sequence[int] | None = None) -> None:
        self.steps = steps
        self.done = list(done) if done is not None else [0] * len(optimizers)
        self._optimizers = list(optimizers)
        self._remove: list[Callable[[], None]] = []
        for index, optimizer in enumerate(optimizers):
            self._remove.append(optimizer.register_step_pre_hook(partial(self._before_step, index)).remove)
            self._remove.append(optimizer.register_step_post_hook(partial(self._after_step, index)).remove)

    def factor(self, index: int) -> float:
        """The factor of the learning rates in the optimizer's next step."""
        return min(1.0, (self.done[index] + 1) / self.steps) if self.steps else 1.0

    def undo(self) -> None:
        """Remove the hooks, and restore learning rates that a failed step has left scaled."""
        while self._remove:
            self._remove.pop()()
        for optimizer in self._optimizers:
            _restore(optimizer)

    def _before_step(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        new = _Step([(group, deepcopy(group["lr"])) for group in optimizer.param_groups])
        # there is one if another warm-up has begun the step, or if the last step raised and is still scaled
        step = _CURRENT_STEP.setdefault(optimizer, new)
        step.factors[self] = self.factor(index)
        for group, rate in step.original_rates:
            _set(group, rate * min(step.factors.values()))

    def _after_step(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        _restore(optimizer)
        self.done[index] += 1


@dataclass
class _Step:
    original_rates: list[tuple[dict[str, Any], Any]]  # of each parameter group
    factors: dict[WarmUp, float] = field(default_factory=dict)


# Shared by all warm-ups: a second one would otherwise take the rate that the first has scaled for the original.
_CURRENT_STEP: WeakKeyDictionary[Optimizer, _Step] = WeakKeyDictionary()


def _restore(optimizer: Optimizer) -> None:
    step = _CURRENT_STEP.pop(optimizer, None)
    for group, rate in step.original_rates if step else ():
        _set(group, rate)


def _set(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(rate, Tensor):
        group["lr"].copy_(rate)  # in place, because a compiled or captured step may hold the tensor
    else:
        group["lr"] = rate
