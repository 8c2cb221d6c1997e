"""Levels normalized together: at its first call a tower runs on all levels, which wait for each other at every layer.

The later calls of the tower return the results. The layer runs on the levels flattened and concatenated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.domain.levels import LevelBehavior, LevelForward, Levels, set_current_forward
from lightning_bn.functional.domain.specific import DomainAssignment, uses_batch_stats
from lightning_bn.layers.behavior import ModuleBehavior
from lightning_bn.lockstep.scheduler import Lockstep


class _LayerInput(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    input: Tensor


def joint_behaviors(levels: Levels) -> list[tuple[nn.Module, ModuleBehavior]]:
    """The behaviors that normalize all levels together, each with its module."""
    towers = _find_towers(levels.module, levels.layers)
    return [*((layer, _JointLayer(levels)) for layer in levels.layers), *((t, _Tower(levels, t)) for t in towers)]


class _Tower(LevelBehavior):
    def __init__(self, levels: Levels, tower: nn.Module) -> None:
        super().__init__(levels)
        self._name = levels.names[tower]
        self._layers = [m for m in tower.modules() if m in levels.layers]

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not any(uses_batch_stats(layer) for layer in self._layers):
            return call(*args, **kwargs)
        levels, inputs = self.levels, (*args, *kwargs.values())
        current = levels.current_forward()
        if current is None:
            raise levels.outside_error(module)
        if len(inputs) != 1:
            raise TypeError(
                f"{self._name!r} got {len(inputs)} arguments. To run on all levels of {levels.name!r} at once "
                "(train_statistics='shared') it must take one tensor, that of a level. Change its arguments, or pass "
                "train_statistics='domain'."
            )
        if module not in current.results:
            if len(current.inputs) != levels.number:
                raise RuntimeError(
                    f"{levels.name!r} got {len(current.inputs)} tensors, but num_domains={levels.number}: every "
                    "forward must have the same number of levels."
                )
            self._index(current.inputs, inputs[0])
            current.results[module] = _run_in_lockstep(current, call)
        results = current.results[module]
        return results.pop(self._index([x for x, _ in results], inputs[0]))[1]

    def _index(self, tensors: Sequence[Tensor], input: Any) -> int:
        for index, tensor in enumerate(tensors):
            if tensor is input:
                return index
        raise TypeError(
            f"{self._name!r} got a tensor that is not in the input of {self.levels.name!r}, or got it twice, so the "
            "levels cannot be normalized together. Pass as level_modules= the module that runs a tower once for each "
            "tensor of a list, or pass train_statistics='domain'."
        )


class _JointLayer(LevelBehavior):
    name = "all levels together"

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = self.levels.current_forward()
        if current is None or not uses_batch_stats(cast(_BatchNorm, module)):
            return call(*args, **kwargs)
        if current.lockstep is None:
            raise TypeError(
                f"{self.levels.names[module]!r} got a single level: {self.levels.name!r} calls a part of a child "
                "module, not the child, which could run on all levels at once. Pass as level_modules= the module that "
                "runs a tower once for each tensor of a list, or pass train_statistics='domain'."
            )
        return current.lockstep.exchange(self.levels.names[module], _LayerInput(call, *args))


def _run_in_lockstep(current: LevelForward, call: Callable[[Tensor], Any]) -> list[tuple[Tensor, Any]]:
    """Run a tower on all levels; inputs and outputs."""
    lockstep = Lockstep[str, _LayerInput, Tensor](lambda _, inputs: _run_layer(current, inputs))

    def run_level(level: int, input: Tensor) -> Any:
        set_current_forward(LevelForward(current.levels, current, calls=current.calls, level=level, lockstep=lockstep))
        return call(input)

    runs = [functools.partial(run_level, level, x) for level, x in enumerate(current.inputs)]
    return list(zip(current.inputs, lockstep.run(runs), strict=True))


def _run_layer(current: LevelForward, levels: Sequence[_LayerInput]) -> Sequence[Tensor]:
    inputs = [level.input for level in levels]
    x, dim, sizes = _concat_levels(inputs)
    current.concatenated = DomainAssignment(torch.arange(len(inputs)).repeat_interleave(torch.tensor(sizes)), dim)
    try:
        return _split_levels(levels[0].forward(x), inputs, dim, sizes)
    finally:
        current.concatenated = None


def _concat_levels(levels: Sequence[Tensor]) -> tuple[Tensor, int, list[int]]:
    """Flatten and concatenate tensors ``(N, C, ...)`` into one that a layer takes.

    Returns:
        ``(N, C, places, 1)``; ``(1, C, places of all samples, 1)`` if levels differ in N; or ``(rows, C)``. Then the
        dimension of concatenation, and each level's size in it.
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
