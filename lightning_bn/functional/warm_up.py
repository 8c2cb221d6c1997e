"""A linear learning-rate warm-up that exists only inside optimizer steps.

Each optimizer's learning rates are scaled by its own step hooks right before a step and put back right after it.
Between steps they are what the scheduler says, so any scheduler, several optimizers and manual optimization go on
undisturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer


class WarmUp:
    """Scale the learning rates of the next ``steps`` steps of each optimizer by 1/steps, 2/steps, ..., 1.

    Where several warm up one optimizer, the one that is least far decides.

    Args:
        optimizers: The optimizers; each counts its own steps.
        steps: Length of the warm-up.
        done: Steps that each optimizer has already taken of it, as in ``done`` of an earlier warm-up.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> warm_up = WarmUp([sgd], steps=2)
        >>> for _ in range(3):
        ...     weight.grad = -torch.ones(1)
        ...     sgd.step()
        >>> weight.item(), sgd.param_groups[0]["lr"]  # 0.5 + 1.0 + 1.0
        (2.5, 1.0)
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
        """What the learning rates of an optimizer's next step are multiplied by."""
        return min(1.0, (self.done[index] + 1) / self.steps) if self.steps else 1.0

    def undo(self) -> None:
        """Take the hooks off, and put back what a step that raised has left scaled."""
        while self._remove:
            self._remove.pop()()
        for optimizer in self._optimizers:
            _put_back(optimizer)

    def _before_step(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        step = _UNDER_WAY.get(optimizer)
        if step is None:  # else another warm-up is at work, or the last step raised and its rates are still scaled
            own = [(group, _copied(group["lr"])) for group in optimizer.param_groups]
            step = _UNDER_WAY[optimizer] = _Step(own)
        step.factors[self] = self.factor(index)
        for group, rate in step.own_rates:
            _set(group, rate * min(step.factors.values()))

    def _after_step(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        _put_back(optimizer)
        self.done[index] += 1


@dataclass
class _Step:
    """A step under way: its optimizer's own learning rates by group, and what the warm-ups of it make of them."""

    own_rates: list[tuple[dict[str, Any], Any]]
    factors: dict[WarmUp, float] = field(default_factory=dict)


_UNDER_WAY: WeakKeyDictionary[Optimizer, _Step] = WeakKeyDictionary()
"""Shared by all warm-ups: one that came second would take for the optimizer's own rate what the first had scaled."""


def _put_back(optimizer: Optimizer) -> None:
    step = _UNDER_WAY.pop(optimizer, None)
    for group, rate in step.own_rates if step else ():
        _set(group, rate)


def _copied(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: float | Tensor) -> None:
    """In place for a tensor, which a compiled or captured step may hold on to."""
    if isinstance(rate, Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate
