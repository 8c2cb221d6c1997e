"""Observed: the layer does what it always does, and the statistics of what it normalizes are taken beside it.

For layers whose batch statistics cannot be recovered from their running ones. Costs a read of each input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.batch_norm_call import BatchNormCall, tracks, with_batch_norm
from lightning_bn.layers.behaviour import Behaviour
from lightning_bn.layers.frozen import is_frozen
from lightning_bn.statistics.moments import Moments


class Observed(Behaviour):
    """Take the statistics of each input of at least two values a channel that would move the running statistics.

    Of a layer that moves none when it trains, because it is frozen or has a momentum of 0, all inputs count.
    Inside a compiled region nothing is measured: it would change what is compiled, and with it the last bits.

    Args:
        layers: Qualified name -> layer.

    Attributes:
        seen: Layer -> moments of all its inputs.
    """

    name = "observed"

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.seen: dict[_BatchNorm, Moments] = {}
        self._names = {layer: name for name, layer in layers.items()}
        self._moving = {layer for layer in layers.values() if _moves(layer)}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Measure what the layer's ``batch_norm`` call is given, then do as ever."""
        if torch.compiler.is_compiling():
            return forward(input)

        def instead(call: BatchNormCall) -> Tensor:
            if tracks(layer, call) or layer not in self._moving:
                self._measure(layer, call.input.detach())
            return call.run()

        return with_batch_norm(instead, self._names[layer], forward, input, required=False)

    @torch.no_grad()
    def _measure(self, layer: _BatchNorm, input: Tensor) -> None:
        if input.numel() > input.shape[1]:
            moments = Moments.of(input)
            self.seen[layer] = self.seen[layer] + moments if layer in self.seen else moments


def _moves(layer: _BatchNorm) -> bool:
    return layer.training and not is_frozen(layer) and layer.momentum != 0
