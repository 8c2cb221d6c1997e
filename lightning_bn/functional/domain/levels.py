"""Feature levels as domains: a level module, such as a RetinaNet head, runs a tower once for each level.

A layer's level is the index of its call within one forward of the level module. The index is reset for every forward,
so an aborted forward leaves no state. Activation checkpointing runs a block again outside of that forward: there the
level is that of the block's input, which was recorded in the first run.

With shared training statistics, a tower runs at its first call on all levels, which wait for each other at every layer.
The layer runs on the levels flattened and concatenated. The later calls of the tower return the results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bn.core.compiler import disable_compile
from lightning_bn.functional.domain.specific import (
    DomainAssignment,
    DomainSource,
    is_recomputing,
    set_entry,
    uses_batch_stats,
)
from lightning_bn.functional.domain.tensors import Choices
from lightning_bn.layers.behavior import Behavior, ModuleBehavior
from lightning_bn.lockstep.scheduler import Lockstep

LayerInput: TypeAlias = tuple[Callable[[Tensor], Tensor], Tensor]
"""What runs a layer on a level, and the level."""


@dataclass
class _LevelForward:
    """One forward of a level module, or one level's forward through a tower in lockstep."""

    inputs: Sequence[Tensor] = ()  # the tensors in the module's input
    calls: dict[nn.Module, int] = field(default_factory=dict)  # of each module so far
    assignments: dict[nn.Module, DomainAssignment] = field(default_factory=dict)  # of layers, with moments so far
    # inputs and outputs of towers that ran on all levels, without those already returned
    results: dict[nn.Module, list[tuple[Tensor, Any]]] = field(default_factory=dict)
    level: int | None = None  # in lockstep
    lockstep: Lockstep[str, LayerInput, Tensor] | None = None


class Levels(ModuleBehavior, DomainSource):
    """Checks the number of calls in each forward of a level module, which ``layers`` are in."""

    name = ""
    outermost = True

    def __init__(self, path: str, module: nn.Module, layers: dict[_BatchNorm, str], choices: Choices) -> None:
        super().__init__(layers, choices)
        self.path, self.module, self.number = path, module, choices.num_domains
        self.names = {m: f"{path}.{inner}" for inner, m in module.named_modules() if inner}
        self.level_of = WeakTensorKeyDictionary()

    def behaviors(self) -> Sequence[tuple[nn.Module, Behavior]]:
        joint: list[tuple[nn.Module, Behavior]] = []
        if self.choices.train_statistics == "shared":
            joint += [(layer, _JointLayer(self)) for layer in self.layers]
            joint += [(tower, _Tower(self)) for tower in _find_towers(self.module, self.layers)]
        # a ScriptModule takes no behavior, and contains no layer with domains
        inner = [module for module in self.names if not isinstance(module, torch.jit.ScriptModule)]
        return [*joint, (self.module, self), *((module, _CallCounter(self)) for module in inner)]

    def unknown(self, layer: nn.Module) -> RuntimeError:
        message = f"{self.names[layer]!r} was run outside of a forward of {self.path!r}, so its level is unknown. "
        if not is_recomputing():
            advice = "Pass as level_modules= the module whose forward runs it once for each level."
        elif self.choices.train_statistics == "shared":
            advice = (
                "Activation checkpointing runs it again on one level, but levels are normalized together "
                f"(train_statistics='shared'). Checkpoint all of {self.path!r}, or pass train_statistics='domain'."
            )
        else:
            advice = "Checkpoint with use_reentrant=False, which passes the same tensor again."
        return RuntimeError(message + advice)

    def wrong_number(self, found: str) -> RuntimeError:
        return RuntimeError(f"{found}, but num_domains={self.number}: every forward must have that number of levels.")

    def not_together(self, found: str) -> TypeError:
        return TypeError(
            f"{found}, so levels cannot be normalized together. Pass as level_modules= the module that runs a tower "
            "once for each tensor of a list, or pass train_statistics='domain'."
        )

    def running(self) -> _LevelForward | None:
        """The running forward of the level module."""
        return _FORWARDS.get({}).get(self)

    @disable_compile
    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = [*args, *kwargs.values()][:1]
        current = _LevelForward([leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)])
        with set_entry(_FORWARDS, self, current):
            output = call(*args, **kwargs)
        for layer, name in self.layers.items():
            calls = current.calls.get(layer, 0)
            if calls not in (0, self.number):
                raise self.wrong_number(f"Layer {name!r} was called {calls} times in one forward of {self.path!r}")
        return output


_FORWARDS: ContextVar[dict[Levels, _LevelForward]] = ContextVar("running forward of each level module")


class _LevelBehavior(ModuleBehavior):
    name = ""
    outermost = True

    def __init__(self, levels: Levels) -> None:
        self.levels = levels


class _CallCounter(_LevelBehavior):
    """Counts calls of a module, and notes the level of its input for a recomputation."""

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        levels, input = self.levels, next(iter((*args, *kwargs.values())), None)
        current = levels.running()
        if current is not None:
            level = current.calls.get(module, 0) if current.level is None else current.level
            current.calls[module] = current.calls.get(module, 0) + 1
            if levels.module.training and isinstance(input, Tensor):
                levels.level_of[input] = level
            if module not in levels.layers:
                return call(*args, **kwargs)
            if level >= levels.number:
                raise levels.wrong_number(f"Layer {levels.names[module]!r} was called {level + 1} times")
            assignment = current.assignments.setdefault(module, DomainAssignment(level, parts=levels.number))
            assignment.domain = level
            with levels.use(assignment):
                return call(*args, **kwargs)

        known = levels.level_of.get(input) if is_recomputing() and isinstance(input, Tensor) else None
        if known is None:
            return call(*args, **kwargs)
        with levels.use(DomainAssignment(known)):
            output = call(*args, **kwargs)
        if isinstance(output, Tensor):
            levels.level_of[output] = known
        return output


class _Tower(_LevelBehavior):
    """At its first call, runs the tower on all levels."""

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        levels, inputs = self.levels, (*args, *kwargs.values())
        layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m in levels.layers]
        if not any(uses_batch_stats(layer) for layer in layers):
            return call(*args, **kwargs)
        current = levels.running()
        if current is None:
            raise levels.unknown(module)
        if len(inputs) != 1:
            raise levels.not_together(
                f"{levels.names[module]!r} got {len(inputs)} arguments, not the tensor of a level"
            )
        if module not in current.results:
            if len(current.inputs) != levels.number:
                raise levels.wrong_number(f"{levels.path!r} got {len(current.inputs)} tensors")
            self._index(module, current.inputs, inputs[0])
            current.results[module] = _run_in_lockstep(levels, current, call)
        results = current.results[module]
        return results.pop(self._index(module, [x for x, _ in results], inputs[0]))[1]

    def _index(self, module: nn.Module, tensors: Sequence[Tensor], input: Any) -> int:
        for index, tensor in enumerate(tensors):
            if tensor is input:
                return index
        found = f"{self.levels.names[module]!r} got a tensor that is not in the input of {self.levels.path!r}"
        raise self.levels.not_together(f"{found}, or got it twice")


class _JointLayer(_LevelBehavior):
    """Runs a layer on all levels at once."""

    name = "all levels together"

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        levels, current = self.levels, self.levels.running()
        if not uses_batch_stats(cast(_BatchNorm, module)):
            return call(*args, **kwargs)
        if current is None:
            raise levels.unknown(module)
        if current.lockstep is None:
            found = f"{levels.names[module]!r} got a single level: {levels.path!r} calls a part of a child module"
            raise levels.not_together(f"{found}, not the child")
        return current.lockstep.exchange(levels.names[module], (call, *args))


def _run_in_lockstep(levels: Levels, current: _LevelForward, call: Callable[[Tensor], Any]) -> list[tuple[Tensor, Any]]:
    """Run a tower on all levels; inputs and outputs."""
    lockstep = Lockstep[str, LayerInput, Tensor](lambda _, inputs: _run_layer(levels, inputs))

    def run_level(level: int, input: Tensor) -> Any:
        with set_entry(_FORWARDS, levels, _LevelForward(calls=current.calls, level=level, lockstep=lockstep)):
            return call(input)

    runs = [functools.partial(run_level, level, x) for level, x in enumerate(current.inputs)]
    return list(zip(current.inputs, lockstep.run(runs), strict=True))


def _run_layer(levels: Levels, calls: Sequence[LayerInput]) -> Sequence[Tensor]:
    (forward, _), inputs = calls[0], [input for _, input in calls]
    x, dim, sizes = _concat_levels(inputs)
    domains = torch.arange(len(inputs)).repeat_interleave(torch.tensor(sizes))
    with levels.use(DomainAssignment(domains, dim)):
        return _split_levels(forward(x), inputs, dim, sizes)


def _concat_levels(levels: Sequence[Tensor]) -> tuple[Tensor, int, list[int]]:
    """Flatten and concatenate tensors ``(N, C, ...)``; the dimension of concatenation, and each level's size in it.

    The result is ``(N, C, places, 1)``; ``(1, C, places of all samples, 1)`` if levels differ in N; or ``(rows, C)``.
    """
    first = levels[0]
    if first.ndim == 2:
        return torch.cat(list(levels)), 0, [len(x) for x in levels]
    same_samples = all(len(x) == len(first) for x in levels)
    flat = [x.flatten(2) if same_samples else x.transpose(0, 1).flatten(1).unsqueeze(0) for x in levels]
    joint = torch.cat(flat, 2)
    return joint.reshape(*joint.shape, *(1,) * (first.ndim - 3)), 2, [x.shape[2] for x in flat]


def _split_levels(joint: Tensor, levels: Sequence[Tensor], dim: int, sizes: list[int]) -> list[Tensor]:
    outputs = []
    for x, part in zip(levels, joint.split(sizes, dim), strict=True):
        if dim == 2 and len(part) != len(x):
            part = part.reshape(part.shape[1], len(x), -1).transpose(0, 1)
        # no view for autograd, because in-place activations refuse the views that a split returns
        outputs.append(torch.ops.aten._unsafe_view(part.clone(memory_format=torch.contiguous_format), x.shape))
    return outputs


def _find_towers(module: nn.Module, layers: dict[_BatchNorm, str]) -> list[nn.Module]:
    """The outermost modules with layers that a level module calls; a ModuleList or ModuleDict is not called itself."""
    towers: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            towers += _find_towers(child, layers)
        elif any(m in layers for m in child.modules()):
            towers.append(child)
    return towers
