"""Observed: the layer does what it always does, and the statistics of its inputs are taken beside it.

For layers whose batch statistics cannot be recovered from their running ones. Costs a read of each input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behaviour import Behaviour
from lightning_bn.statistics.moments import Moments, batch_statistics


class Observed(Behaviour):
    """Take the statistics of each input of at least two values a channel.

    Inside a compiled region nothing is measured: it would change what is compiled, and with it the last bits.

    Attributes:
        seen: Layer -> moments of all its inputs.
    """

    name = "observed"

    def __init__(self) -> None:
        self.seen: dict[_BatchNorm, Moments] = {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Measure ``input``, then do as ever."""
        if not torch.compiler.is_compiling():
            self._measure(layer, input)
        return forward(input)

    @torch.no_grad()
    def _measure(self, layer: _BatchNorm, input: Tensor) -> None:
        count = input.numel() // layer.num_features
        if count > 1:
            mean, var = batch_statistics(input.detach())
            moments = Moments(mean.new_tensor(count).double(), mean.double(), var.double() * count)
            self.seen[layer] = self.seen[layer] + moments if layer in self.seen else moments
