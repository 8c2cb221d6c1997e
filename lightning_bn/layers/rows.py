"""How many rows a layer is given: as many as there are samples, or many more, as in a head that runs on regions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behavior import Behavior
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm


class CountsRows(Behavior):
    """Do as ever, and remember the rows of the smallest input that a ``batch_norm`` call was given.

    Attributes:
        fewest: Of all layers and calls; None before the first.
    """

    name = "rows counted"

    def __init__(self) -> None:
        self.fewest: int | None = None

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Count, then do as ever."""
        return replace_batch_norm(self._batch_norm, "", forward, input, required=False)

    def _batch_norm(self, call: BatchNormCall) -> Tensor:
        rows = len(call.input)
        self.fewest = rows if self.fewest is None else min(self.fewest, rows)
        return call.run()
