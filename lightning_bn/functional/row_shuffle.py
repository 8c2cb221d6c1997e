"""A module whose rows change ranks on the way in and come home on the way out, in training (paper, Sec. 6.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.exchange import add_anchors, exchange_rows, restore_rows
from lightning_bn.layers.behavior import ModuleBehavior, has_behavior


class RowShuffle(ModuleBehavior):
    """In train mode, exchange the rows of the module's arguments among ranks, and bring its outputs home.

    Nothing is exchanged while a population is estimated, where ranks do not wait for each other, nor where all
    BatchNorm layers of the module normalize with stored statistics, which makes every row its own affair.

    Args:
        modules: Qualified name -> module.
        layers: All BatchNorm layers of the model.
        generator: Draws the order of rows, alike on all ranks.
        group: The ranks.

    Attributes:
        unshuffled: Calls in train mode whose rows stayed, because there were fewer than two a rank.
        anchors: Of the exchanges in the running call of the whole model; None outside of one.
    """

    kind = "row shuffle"
    name = "rows exchanged"

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        layers: Iterable[_BatchNorm],
        generator: torch.Generator,
        group: ProcessGroup | None,
    ) -> None:
        self._names = {module: name for name, module in modules.items()}
        self._layers = list(layers)
        self._inside = {m: [b for b in m.modules() if isinstance(b, _BatchNorm)] for m in modules.values()}
        self._generator, self._group = generator, group
        self.unshuffled = 0
        self.anchors: list[Tensor] | None = None

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Exchange, call, restore."""
        if not module.training or not self._matters(self._inside[module]):
            return call(*args, **kwargs)
        return self._exchanged(module, call, args, kwargs)

    def _matters(self, inside: list[_BatchNorm]) -> bool:
        if any(has_behavior(layer, "batch mode") for layer in self._layers):
            return False
        return not inside or any(layer.training and not has_behavior(layer, "frozen") for layer in inside)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _exchanged(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self._names[module]
        with _naming(name):
            (args, kwargs), exchange = exchange_rows((args, kwargs), self._generator, self._group)
        self.unshuffled += exchange.route is None
        output = call(*args, **kwargs)
        with _naming(name):
            home = restore_rows(output, exchange)
        if self.anchors is not None and exchange.anchor is not None:
            self.anchors.append(exchange.anchor)
        return home


class AnchorBackward(ModuleBehavior):
    """Given to the whole model: every output takes backward through the exchanges made while it was computed."""

    name = ""

    def __init__(self, exchanged: RowShuffle) -> None:
        self._exchanged = exchanged

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call, and tie."""
        if self._exchanged.anchors is not None:  # a training step that calls its own module
            return call(*args, **kwargs)
        anchors: list[Tensor] = []
        self._exchanged.anchors = anchors
        try:
            output = call(*args, **kwargs)
        finally:
            self._exchanged.anchors = None
        return add_anchors(output, anchors)


@contextmanager
def _naming(module: str) -> Iterator[None]:
    """Errors of an exchange, with the name of the module whose rows they are."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"Module {module!r}: {error}") from error
