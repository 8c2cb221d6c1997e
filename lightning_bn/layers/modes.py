"""Modes during a pass: changes by a step hold while it runs, and are reverted afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_FLAGS = ("training", "momentum", "track_running_stats")


@dataclass(frozen=True)
class LayerFlags:
    """Reads and sets the flags of BatchNorm layers that decide if a call is tracked.

    A step may change them around a forward. Every step starts with the initial ones.
    """

    layers: list[dict[str, Any]]
    initial: list[tuple[Any, ...]]

    def now(self) -> list[tuple[Any, ...]]:
        return [tuple([own[flag] for flag in _FLAGS]) for own in self.layers]

    def set(self, flags: list[tuple[Any, ...]]) -> None:
        for own, (training, momentum, tracks) in zip(self.layers, flags, strict=True):
            own["training"], own["momentum"], own["track_running_stats"] = training, momentum, tracks


@contextmanager
def preserve_flags(layers: Collection[_BatchNorm], training: bool | None) -> Iterator[LayerFlags]:
    """Put layers into a mode (None: the one they have), and restore all their attributes on leaving."""
    attributes = [vars(layer) for layer in layers]
    before = [dict(own) for own in attributes]
    try:
        for own in attributes if training is not None else ():
            own["training"] = training
        yield LayerFlags(attributes, [tuple([own[flag] for flag in _FLAGS]) for own in attributes])
    finally:
        for own, values in zip(attributes, before, strict=True):
            for key in own.keys() - values.keys():
                del own[key]
            own.update(values)


@contextmanager
def keep_in_eval(modules: Collection[nn.Module]) -> Iterator[None]:
    """Keep modules in eval mode even if a step calls ``train()`` on them, and restore their modes on leaving."""
    modes = {module: module.training for module in modules}
    original = nn.Module.train

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        original(self, mode)  # also sets the children
        self.training = mode and self not in modes
        return self

    try:
        for module in modes:
            vars(module)["training"] = False  # bypasses the slow `nn.Module.__setattr__`
        # not on the instances, so that a step can copy a module
        nn.Module.train = train  # type: ignore[method-assign,assignment]
        yield
    finally:
        nn.Module.train = original  # type: ignore[method-assign]
        for module, mode in modes.items():
            vars(module)["training"] = mode
