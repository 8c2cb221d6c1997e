"""Modes during a pass: what a step sets is honored while it runs, and undone afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_FLAGS = ("training", "momentum", "track_running_stats")


class LayerFlags:
    """The flags of BatchNorm layers that say whether a call is tracked.

    A step may change them around a forward that is not to be tracked. Every step starts from those that the layers had
    when this was made, and forwards that wait for each other keep their own.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        self._layers = [vars(layer) for layer in layers]
        self._first = self.now()

    def now(self) -> list[tuple[Any, ...]]:
        """The flags as they are."""
        training, momentum, tracks = _FLAGS
        return [(own[training], own[momentum], own[tracks]) for own in self._layers]

    def set(self, flags: list[tuple[Any, ...]]) -> None:
        """Give the layers these flags."""
        if self.now() != flags:
            for own, values in zip(self._layers, flags, strict=True):
                own.update(zip(_FLAGS, values, strict=True))

    def reset(self) -> None:
        """Give the layers the flags that they had at first."""
        self.set(self._first)


@contextmanager
def preserve_flags(layers: Collection[_BatchNorm], training: bool | None) -> Iterator[LayerFlags]:
    """Layers in a given mode (None: that which they have) at the start of every step; on leaving they are as before.

    So are all their attributes: a layer may count its calls in one.
    """
    before = [(vars(layer), dict(vars(layer))) for layer in layers]
    try:
        for layer in layers if training is not None else ():
            vars(layer)["training"] = training
        yield LayerFlags(layers)
    finally:
        for now, then in before:
            for key in now.keys() - then.keys():
                del now[key]
            now.update(then)


@contextmanager
def keep_in_eval(modules: Collection[nn.Module]) -> Iterator[None]:
    """Keep modules in eval mode even if a step calls ``train()`` on them; on leaving they are as before.

    ``train`` is replaced in ``nn.Module`` itself, not on the instances: a copy that a step makes of a module is to be
    an ordinary one.
    """
    modes = {module: module.training for module in modules}
    original = nn.Module.train

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        original(self, mode)  # of the children, too
        self.training = mode and self not in modes
        return self

    try:
        for module in modes:
            module.training = False
        nn.Module.train = train  # type: ignore[method-assign,assignment]
        yield
    finally:
        nn.Module.train = original  # type: ignore[method-assign]
        for module, mode in modes.items():
            module.training = mode
