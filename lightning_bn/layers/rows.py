"""How many rows a layer is given: as many as there are samples, or many more, as in a head that runs on regions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behaviour import Behaviour


class CountsRows(Behaviour):
    """Do as ever, and remember the rows, ``len(input)``, of the smallest input.

    Attributes:
        fewest: Of all layers and calls; None before the first.
    """

    name = "rows counted"

    def __init__(self) -> None:
        self.fewest: int | None = None

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Count, then do as ever."""
        self.fewest = len(input) if self.fewest is None else min(self.fewest, len(input))
        return forward(input)
