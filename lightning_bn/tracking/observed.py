"""Observed and Witnessed: the layer does what it always does, and what its calls were is noted beside it.

Inside a compiled region neither notes anything: it would change what is compiled, and with it the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import Moments
from lightning_bn.layers.batch_mode import is_plain
from lightning_bn.layers.behavior import Behavior
from lightning_bn.layers.frozen import is_frozen
from lightning_bn.layers.override import BatchNormCall, plain_call, replace_batch_norm, tracks


class Call(NamedTuple):
    """An input that a layer normalized, and the layer's momentum at that call."""

    moments: Moments
    momentum: float | None


class Observed(Behavior):
    """Take the statistics of each input of at least two values a channel that would move the running statistics.

    Of a layer that moves none when it trains, because it is frozen or has a momentum of 0, all inputs count. A forward
    without a ``batch_norm`` call normalizes its input if its output is that of torch's own layer. Costs a read of each
    input.

    Args:
        layers: Qualified name -> layer.

    Attributes:
        seen: Layer -> its calls since `begin`.
        unseen: Layers of which it cannot be told what they normalize.
    """

    name = "observed"
    innermost = True

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self._within = {
            layer: [m for m in layer.modules() if isinstance(m, _BatchNorm) and m is not layer] for layer in self._names
        }
        self.unseen: set[_BatchNorm] = set()
        self.begin()

    def begin(self) -> None:
        """Call before a batch: forget what was seen."""
        self.seen: dict[_BatchNorm, list[Call]] = {}
        self._moving = {layer for layer in self._names if _moves(layer)}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Measure what the layer's ``batch_norm`` call is given, then do as ever."""
        if torch.compiler.is_compiling():
            return forward(input)
        called = False

        def instead(call: BatchNormCall) -> Tensor:
            nonlocal called
            if not self._is_anothers(layer, call):
                called = True
                self._take(layer, call)
            return call.run()

        version = _version(input)
        output = replace_batch_norm(instead, self._names[layer], forward, input, required=False)
        if not called and layer not in self.unseen:
            self._at_the_door(layer, input, output, untouched=_version(input) == version)
        return output

    @torch.no_grad()
    def _at_the_door(self, layer: _BatchNorm, input: Any, output: Any, untouched: bool) -> None:
        # at every call: what it does to one input says nothing of the next, there may be a mask
        if untouched and is_plain(layer, input, output):
            self._take(layer, plain_call(layer, input))
        else:
            self.unseen.add(layer)

    def _is_anothers(self, layer: _BatchNorm, call: BatchNormCall) -> bool:
        """Whether it is the call of a layer within the layer, as in timm's `SplitBatchNorm2d`."""
        given = call.running_mean
        return given is not None and any(given is m._buffers["running_mean"] for m in self._within[layer])

    @torch.no_grad()
    def _take(self, layer: _BatchNorm, call: BatchNormCall) -> None:
        input = call.input.detach()
        stored = layer._buffers["running_mean"]
        if stored is not None and input.shape[1] != len(stored):  # which channels belong together cannot be told
            self.unseen.add(layer)
        elif call.values > 1 and (tracks(layer, call) or layer not in self._moving):
            self.seen.setdefault(layer, []).append(Call(Moments.of(input), vars(layer)["momentum"]))


class Witnessed(Behavior):
    """Note, on the host, at which momentum each call was made that a layer counts.

    Attributes:
        momenta: Layer -> the momentum of each such call since `begin`, 0 among them; of all layers that were run.
    """

    name = "witnessed"
    innermost = True

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Call before a batch: forget what was noted."""
        self.momenta: dict[_BatchNorm, list[float | None]] = {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Note the momentum, then do as ever."""
        if not torch.compiler.is_compiling():
            own, noted = vars(layer), self.momenta.setdefault(layer, [])
            if own["training"] and own["track_running_stats"]:
                noted.append(own["momentum"])
        return forward(input)


def _moves(layer: _BatchNorm) -> bool:
    return layer.training and not is_frozen(layer) and layer.momentum != 0


def _version(input: Any) -> int:
    """Of a tensor: its number of changes in place, as far as torch counts them."""
    return input._version if isinstance(input, Tensor) and not input.is_inference() else 0
