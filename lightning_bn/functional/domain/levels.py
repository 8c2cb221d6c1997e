"""Feature levels as domains: a tower that its owner runs once for each level (RetinaNet's and FCOS' heads).

Which level a layer is shown is the number of its call within one forward of the owner. Every forward counts afresh, so
that one that was broken off, or that nobody expected, leaves nothing behind. Activation checkpointing runs a part of a
forward again, outside of it: there the level is that of the tensor it starts from, noted when it came by first.

Levels are normalized together by lockstep: when the tower is given the first one, it is run on all of them, which wait
for each other at every layer; the owner's later calls are answered from the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bn.functional.domain.specific import Choice, Shown, recomputing, uses_batch_stats
from lightning_bn.layers.behavior import Behavior, ModuleBehavior, attach, detach
from lightning_bn.lockstep.scheduler import Lockstep


class _Arrival(NamedTuple):
    """What a level brings to a layer."""

    forward: Callable[[Tensor], Tensor]
    input: Tensor


@dataclass
class _Forward:
    """One forward of an owner, or one level's way through a tower in lockstep.

    Attributes:
        owner: Whose it is.
        around: The forward in which it takes place, of another owner.
        inputs: The tensors that the owner was given.
        calls: How often each module was called.
        batches: What each layer is shown.
        towers: The results of towers that were run on all levels, those not yet asked for.
        level: The level, if it is on its way through a tower.
        lockstep: Where it waits for the others there.
        side_by_side: What a layer is shown that is given all levels as one.
    """

    owner: Levels
    around: _Forward | None
    inputs: Sequence[Tensor] = ()
    calls: dict[nn.Module, int] = field(default_factory=dict)
    batches: dict[nn.Module, Shown] = field(default_factory=dict)
    towers: dict[nn.Module, list[tuple[Tensor, Any]]] = field(default_factory=dict)
    level: int | None = None
    lockstep: Lockstep[str, _Arrival, Tensor] | None = None
    concat_levels: Shown | None = None


_NOW: ContextVar[_Forward | None] = ContextVar("forward of an owner", default=None)
"""The innermost forward that is running. Of a context: forwards that wait for each other keep their own."""


class Levels:
    """Tells which level a layer within ``owner`` is shown, and normalizes levels together if ``train_statistics`` is shared.

    Args:
        name: Qualified name of the owner.
        owner: The module whose forward runs a tower once for each level.
        layers: Layer -> qualified name: those within it that are concerned.
        number: How many levels there are.
        train_statistics: Whether each level is normalized by itself.
    """

    def __init__(
        self, name: str, owner: nn.Module, layers: dict[_BatchNorm, str], number: int, train_statistics: Choice
    ) -> None:
        self.name, self.number, self.layers = name, number, layers
        self._owner, self._train_statistics = owner, train_statistics
        self._names = {m: f"{name}.{within}" if name else within for within, m in owner.named_modules() if within}
        self._level_of = WeakTensorKeyDictionary()
        self._again: int | None = None

    def start(self, undo: list[Callable[[], None]]) -> None:
        """Watch the owner; adds what to call to stop, one by one, so that an error leaves the list complete."""
        given: list[tuple[nn.Module, Behavior]] = [(self._owner, _Owner(self))]
        if self._train_statistics == "shared":
            given += [(layer, _AllLevels(self)) for layer in self.layers]
            given += [(tower, _Tower(self, tower)) for tower in _towers(self._owner, self.layers)]
        # a scripted module takes no behavior, and needs none: there is no layer of ours within it
        counted = [module for module in self._names if not isinstance(module, torch.jit.ScriptModule)]
        given += [(module, _Counted(self)) for module in counted]
        for module, behavior in given:
            attach(module, behavior)
            undo.append(lambda module=module, behavior=behavior: detach(module, behavior))  # type: ignore[misc]

    def shown(self, layer: _BatchNorm) -> Shown:
        """What a layer is shown at the moment.

        Raises:
            RuntimeError: If it is run outside of its owner, or once too often.
        """
        now = self.now()
        if now is None:
            if (
                not recomputing()
                or self._again is None
                or (self._train_statistics == "shared" and uses_batch_stats(layer))
            ):
                raise self._outside(layer)
            return Shown(self._again)
        if now.concat_levels is not None:
            return now.concat_levels
        if now.level is not None:
            return Shown(now.level)
        level = now.calls[layer] - 1
        if level >= self.number:
            raise RuntimeError(
                f"Layer {self._names[layer]!r} was called more than {self.number} times in one forward of "
                f"{self.name!r}, and num_domains={self.number}: pass the number of levels there are."
            )
        batch = now.batches.setdefault(layer, Shown(level, parts=self.number))
        batch.domain = level
        return batch

    def now(self) -> _Forward | None:
        """The forward of this owner that is running."""
        now = _NOW.get()
        while now is not None and now.owner is not self:
            now = now.around
        return now

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def owner_forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a forward of the owner, which counts afresh."""
        now = _Forward(
            self, _NOW.get(), [leaf for leaf in tree_leaves(_first(args, kwargs)) if isinstance(leaf, Tensor)]
        )
        token = _NOW.set(now)
        try:
            output = forward(*args, **kwargs)
        finally:
            _NOW.reset(token)
        for layer, name in self.layers.items():
            calls = now.calls.get(layer, 0)
            if calls not in (0, self.number):
                raise RuntimeError(
                    f"Layer {name!r} was called {calls} times in one forward of {self.name!r}, and "
                    f"num_domains={self.number}: the number of levels must always be the same."
                )
        return output

    def counted(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a forward of a module within the owner, and note which level it was of; or find that out again."""
        now, input = self.now(), _first(args, kwargs)
        if now is not None:
            level = now.calls.get(module, 0) if now.level is None else now.level
            now.calls[module] = now.calls.get(module, 0) + 1
            if self._owner.training and isinstance(input, Tensor):
                self._level_of[input] = level
            return forward(*args, **kwargs)
        known = self._level_of.get(input) if recomputing() and isinstance(input, Tensor) else None
        if known is None:
            return forward(*args, **kwargs)
        before, self._again = self._again, known
        try:
            output = forward(*args, **kwargs)
        finally:
            self._again = before
        if isinstance(output, Tensor):
            self._level_of[output] = known
        return output

    def tower_forward(self, tower: nn.Module, forward: Callable[[Tensor], Any], *inputs: Any) -> Any:
        """Run a tower on all levels, or answer from what it made of them."""
        now, name = self.now(), self._names[tower]
        if now is None:
            raise self._outside(tower)
        if len(inputs) != 1:
            raise TypeError(
                f"{name!r} was given {len(inputs)} arguments: run on all levels of {self.name!r} at once "
                "(train_statistics='shared') it can take a level's tensor alone, since nothing says what else belongs to the other "
                "levels. Give it one argument, or pass train_statistics='domain'."
            )
        (input,) = inputs
        if tower not in now.towers:
            if len(now.inputs) != self.number:
                raise RuntimeError(
                    f"{self.name!r} was given {len(now.inputs)} tensors, and num_domains={self.number}: the number of "
                    "levels must always be the same."
                )
            self._check_no_level(now.inputs, input, name)
            now.towers[tower] = self._in_lockstep(now, forward)
        left = now.towers[tower]
        self._check_no_level([x for x, _ in left], input, name)
        place = next(i for i, (x, _) in enumerate(left) if x is input)
        return left.pop(place)[1]

    def _check_no_level(self, levels: Sequence[Tensor], input: Any, name: str) -> None:
        if not any(x is input for x in levels):
            raise TypeError(
                f"{name!r} was given what is no tensor of its owner's input (or one for the second time), so the "
                f"levels of {self.name!r} cannot be normalized together: pass as level_modules= the module that runs a tower "
                "once for each tensor of a list, or train_statistics='domain'."
            )

    def _in_lockstep(self, now: _Forward, forward: Callable[[Tensor], Any]) -> list[tuple[Tensor, Any]]:
        lockstep = Lockstep[str, _Arrival, Tensor](lambda _, arrivals: self._all_levels(now, arrivals))

        def of_level(level: int, input: Tensor) -> Callable[[], Any]:
            def run() -> Any:
                _NOW.set(_Forward(self, now, calls=now.calls, level=level, lockstep=lockstep))
                return forward(input)

            return run

        results = lockstep.run([of_level(level, x) for level, x in enumerate(now.inputs)])
        return list(zip(now.inputs, results, strict=True))

    def _all_levels(self, now: _Forward, arrivals: Sequence[_Arrival]) -> Sequence[Tensor]:
        """Run a layer once, on all levels side by side."""
        forward = arrivals[0].forward
        inputs = [a.input for a in arrivals]
        whole, dim, sizes = concat_levels(inputs)
        levels = torch.arange(len(inputs)).repeat_interleave(torch.tensor(sizes))
        now.concat_levels = Shown(levels, dim)
        try:
            return split_levels(forward(whole), inputs, dim, sizes)
        finally:
            now.concat_levels = None

    def by_itself(self, layer: _BatchNorm) -> TypeError:
        """What to say of a layer that is run on one level, where all are to be normalized together."""
        return TypeError(
            f"{self._names[layer]!r} was given one level by itself: {self.name!r} calls a part of a child module and "
            "not the child, which could be run on all levels at once. Pass as level_modules= the module that runs a tower once "
            "for each tensor of a list, or train_statistics='domain'."
        )

    def _outside(self, module: nn.Module) -> RuntimeError:
        found = f"{self._names[module]!r} was run outside of a forward of {self.name!r}, so nobody knows its level"
        if not recomputing():
            return RuntimeError(
                f"{found}: pass as level_modules= the module whose forward runs it once for each level."
            )
        if self._train_statistics == "shared":
            return RuntimeError(
                f"{found}: activation checkpointing runs it again by itself, and levels are normalized together "
                f"(train_statistics='shared'). Checkpoint the whole of {self.name!r}, or pass train_statistics='domain'."
            )
        return RuntimeError(f"{found}: checkpoint with use_reentrant=False, which gives it the same tensor again.")


class _Owner(ModuleBehavior):
    name = ""
    outermost = True

    def __init__(self, levels: Levels) -> None:
        self._levels = levels

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._levels.owner_forward(call, *args, **kwargs)


class _Counted(ModuleBehavior):
    name = ""
    outermost = True

    def __init__(self, levels: Levels) -> None:
        self._levels = levels

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._levels.counted(module, call, *args, **kwargs)


class _Tower(ModuleBehavior):
    name = ""
    outermost = True

    def __init__(self, levels: Levels, tower: nn.Module) -> None:
        self._levels = levels
        self._layers = [m for m in tower.modules() if m in levels.layers]

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not any(uses_batch_stats(within) for within in self._layers):
            return call(*args, **kwargs)
        return self._levels.tower_forward(module, call, *args, *kwargs.values())


class _AllLevels(Behavior):
    """A layer that waits for all levels and is run on them as on one."""

    name = "all levels as one"
    outermost = True

    def __init__(self, levels: Levels) -> None:
        self._levels = levels

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        now = self._levels.now()
        if now is None or not uses_batch_stats(layer):
            return forward(input)
        if now.lockstep is None:
            raise self._levels.by_itself(layer)
        return now.lockstep.exchange(self._levels.layers[layer], _Arrival(forward, input))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)


def concat_levels(levels: Sequence[Tensor]) -> tuple[Tensor, int, list[int]]:
    """Several ``(N, C, ...)`` as one that a layer takes in their place: flattened and concatenated.

    Returns:
        ``(N, C, all places, 1)``, or ``(1, C, all places of all samples, 1)`` where levels differ in N, or ``(all rows,
        C)``; the dimension along which they lie side by side; and how long each is there.
    """
    first = levels[0]
    if first.ndim == 2:
        return torch.cat(list(levels)), 0, [len(x) for x in levels]
    alike = all(len(x) == len(first) for x in levels)
    flat = [x.flatten(2) if alike else x.transpose(0, 1).flatten(1).unsqueeze(0) for x in levels]
    whole = torch.cat(flat, 2)
    return whole.reshape(*whole.shape, *(1,) * (first.ndim - 3)), 2, [x.shape[2] for x in flat]


def split_levels(whole: Tensor, levels: Sequence[Tensor], dim: int, sizes: list[int]) -> list[Tensor]:
    """What `concat_levels` has put together, in the shapes of ``levels``."""
    found = []
    for x, part in zip(levels, whole.split(sizes, dim), strict=True):
        if dim == 2 and len(part) != len(x):
            part = part.reshape(part.shape[1], len(x), -1).transpose(0, 1)
        # autograd sees no view in it: activations that work in place refuse one that a split returns
        found.append(torch.ops.aten._unsafe_view(part.clone(memory_format=torch.contiguous_format), x.shape))
    return found


def _towers(owner: nn.Module, layers: dict[_BatchNorm, str]) -> list[nn.Module]:
    """The outermost modules that an owner calls to get at layers; containers without a forward are looked through."""
    found: list[nn.Module] = []
    for child in owner.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += _towers(child, layers)
        elif any(m in layers for m in child.modules()):
            found.append(child)
    return found
