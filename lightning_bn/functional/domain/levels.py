"""Feature levels as domains: a level module, such as a RetinaNet head, runs a tower once for each level.

A layer's level is the index of its call within one forward of the level module. The index is reset for every forward,
so an aborted forward leaves no state. Activation checkpointing runs a block again outside of that forward: there the
level is that of the block's input, which was recorded in the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bn.core.compiler import disable_compile
from lightning_bn.functional.domain.specific import DomainAssignment, is_recomputing, uses_batch_stats
from lightning_bn.functional.domain.tensors import Choice
from lightning_bn.layers.behavior import ModuleBehavior
from lightning_bn.lockstep.scheduler import Lockstep


@dataclass
class LevelForward:
    """One forward of a level module, or one level's forward through a tower in lockstep.

    Attributes:
        levels: Whose forward it is.
        outer: The forward in which it runs, perhaps of another level module.
        inputs: The tensors in the module's input.
        calls: Number of calls of each module so far.
        assignments: The domains of each layer's current input.
        results: Inputs and outputs of towers that ran on all levels, without those already returned.
        level: The level, in lockstep.
        lockstep: Where it waits for the other levels.
        concatenated: The domains of a layer's input while that is all levels concatenated.
    """

    levels: Levels
    outer: LevelForward | None
    inputs: Sequence[Tensor] = ()
    calls: dict[nn.Module, int] = field(default_factory=dict)
    assignments: dict[nn.Module, DomainAssignment] = field(default_factory=dict)
    results: dict[nn.Module, list[tuple[Tensor, Any]]] = field(default_factory=dict)
    level: int | None = None
    lockstep: Lockstep[str, Any, Tensor] | None = None
    concatenated: DomainAssignment | None = None


# A context variable, because each of several forwards in lockstep has its own.
_CURRENT_FORWARD: ContextVar[LevelForward | None] = ContextVar("innermost forward of a level module", default=None)
set_current_forward = _CURRENT_FORWARD.set


class Levels:
    """Knows the level of the inputs of ``layers``, which are in the level module ``module``."""

    def __init__(
        self, name: str, module: nn.Module, layers: dict[_BatchNorm, str], number: int, train_statistics: Choice
    ) -> None:
        self.name, self.module, self.layers, self.number = name, module, layers, number
        self.train_statistics = train_statistics
        self.names = {m: f"{name}.{inner}" for inner, m in module.named_modules() if inner}
        self.level_of = WeakTensorKeyDictionary()
        self.recomputed_level: int | None = None

    def behaviors(self) -> list[tuple[nn.Module, ModuleBehavior]]:
        """The behaviors that count calls, each with its module."""
        # a ScriptModule takes no behavior, and contains no layer with domains
        inner = [module for module in self.names if not isinstance(module, torch.jit.ScriptModule)]
        return [(self.module, _LevelModule(self)), *((module, _CallCounter(self)) for module in inner)]

    def assignment(self, layer: _BatchNorm) -> DomainAssignment:
        current = self.current_forward()
        if current is None:
            level = self.recomputed_level if is_recomputing() else None
            if level is None or (self.train_statistics == "shared" and uses_batch_stats(layer)):
                raise self.outside_error(layer)
            return DomainAssignment(level)
        if current.concatenated is not None:
            return current.concatenated
        if current.level is not None:
            return DomainAssignment(current.level)
        level = current.calls[layer] - 1
        if level >= self.number:
            raise RuntimeError(
                f"Layer {self.names[layer]!r} was called more than {self.number} times in one forward of "
                f"{self.name!r}, but num_domains={self.number}: pass the number of levels."
            )
        assignment = current.assignments.setdefault(layer, DomainAssignment(level, parts=self.number))
        assignment.domain = level
        return assignment

    def current_forward(self) -> LevelForward | None:
        """The running forward of this level module."""
        current = _CURRENT_FORWARD.get()
        while current is not None and current.levels is not self:
            current = current.outer
        return current

    def outside_error(self, module: nn.Module) -> RuntimeError:
        message = f"{self.names[module]!r} was run outside of a forward of {self.name!r}, so its level is unknown. "
        if not is_recomputing():
            advice = "Pass as level_modules= the module whose forward runs it once for each level."
        elif self.train_statistics == "shared":
            advice = (
                "Activation checkpointing runs it again on one level, but levels are normalized together "
                f"(train_statistics='shared'). Checkpoint all of {self.name!r}, or pass train_statistics='domain'."
            )
        else:
            advice = "Checkpoint with use_reentrant=False, which passes the same tensor again."
        return RuntimeError(message + advice)


class LevelBehavior(ModuleBehavior):
    """Base of the behaviors of a level module and of the modules within it."""

    name = ""
    outermost = True

    def __init__(self, levels: Levels) -> None:
        self.levels = levels


class _LevelModule(LevelBehavior):
    """Counts the calls within each forward from 0."""

    @disable_compile
    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        levels = self.levels
        tensors = [leaf for leaf in tree_leaves(_first(args, kwargs)) if isinstance(leaf, Tensor)]
        current = LevelForward(levels, _CURRENT_FORWARD.get(), tensors)
        token = _CURRENT_FORWARD.set(current)
        try:
            output = call(*args, **kwargs)
        finally:
            _CURRENT_FORWARD.reset(token)
        for layer, name in levels.layers.items():
            calls = current.calls.get(layer, 0)
            if calls not in (0, levels.number):
                raise RuntimeError(
                    f"Layer {name!r} was called {calls} times in one forward of {levels.name!r}, but "
                    f"num_domains={levels.number}: every forward must have the same number of levels."
                )
        return output


class _CallCounter(LevelBehavior):
    """Counts calls of a module, and notes the level of its input for a recomputation."""

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        levels, input = self.levels, _first(args, kwargs)
        current = levels.current_forward()
        if current is not None:
            level = current.calls.get(module, 0) if current.level is None else current.level
            current.calls[module] = current.calls.get(module, 0) + 1
            if levels.module.training and isinstance(input, Tensor):
                levels.level_of[input] = level
            return call(*args, **kwargs)
        known = levels.level_of.get(input) if is_recomputing() and isinstance(input, Tensor) else None
        if known is None:
            return call(*args, **kwargs)
        before, levels.recomputed_level = levels.recomputed_level, known
        try:
            output = call(*args, **kwargs)
        finally:
            levels.recomputed_level = before
        if isinstance(output, Tensor):
            levels.level_of[output] = known
        return output


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)
