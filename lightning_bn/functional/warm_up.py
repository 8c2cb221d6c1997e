"""A linear learning-rate warm-up that exists only inside optimizer steps.

Each optimizer's learning rates are scaled by its own step hooks right before a step and put back right after it.
Between steps they are what the scheduler says, so any scheduler, several optimizers and manual optimization go on
undisturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class WarmUp:
    """Scale the learning rates of the next ``steps`` steps of each optimizer by 1/steps, 2/steps, ..., 1.

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
        self._own_rates: dict[int, list[tuple[dict[str, Any], Any]]] = {}
        self._remove: list[Callable[[], None]] = []
        for index, optimizer in enumerate(optimizers):
            self._remove.append(optimizer.register_step_pre_hook(self._scale_for(index)).remove)
            self._remove.append(optimizer.register_step_post_hook(self._restore_for(index)).remove)

    def factor(self, index: int) -> float:
        """What the learning rates of an optimizer's next step are multiplied by."""
        return min(1.0, (self.done[index] + 1) / self.steps) if self.steps else 1.0

    @property
    def over(self) -> bool:
        """Whether every optimizer is past its warm-up."""
        return all(done >= self.steps for done in self.done)

    def undo(self) -> None:
        """Take the hooks off, and put back what a step that raised has left scaled."""
        for index in list(self._own_rates):
            self._restore(index)
        while self._remove:
            self._remove.pop()()

    def _scale_for(self, index: int) -> Callable[..., None]:
        def scale(optimizer: Optimizer, *_: Any) -> None:
            self._restore(index)  # of a step that raised
            factor = self.factor(index)
            self._own_rates[index] = [(group, _copied(group["lr"])) for group in optimizer.param_groups]
            for group, rate in self._own_rates[index]:
                _set(group, rate * factor)

        return scale

    def _restore_for(self, index: int) -> Callable[..., None]:
        def restore(*_: Any) -> None:
            self._restore(index)
            self.done[index] += 1

        return restore

    def _restore(self, index: int) -> None:
        for group, rate in self._own_rates.pop(index, ()):
            _set(group, rate)


def _copied(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: float | Tensor) -> None:
    """In place for a tensor, which a compiled or captured step may hold on to."""
    if isinstance(rate, Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate
