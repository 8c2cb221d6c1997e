"""Behaviors that record the calls of a layer and change nothing: `MeasureInputs` and `RecordMomenta`.

Both are inactive in compiled regions: they would change what is compiled, and with it the last bits of results.
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
    """Holds the moments of an input that a layer normalized, and the layer's momentum at that call."""

    moments: Moments
    momentum: float | None


class MeasureInputs(Behavior):
    """Measure each input that would move the layer's running statistics, at the cost of one more read.

    For a layer that moves none in training (frozen, or momentum 0) all inputs are measured. ``calls`` has them since
    `begin`. ``unmeasurable`` has the layers without a ``batch_norm`` call whose output differs from that of torch's
    layer.
    """

    name = "inputs measured"
    innermost = True

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self._inner = {
            layer: [m for m in layer.modules() if isinstance(m, _BatchNorm) and m is not layer] for layer in self._names
        }
        self.unmeasurable: set[_BatchNorm] = set()
        self.begin()

    def begin(self) -> None:
        self.calls: dict[_BatchNorm, list[Call]] = {}
        self._moving = {
            layer for layer in self._names if layer.training and not is_frozen(layer) and layer.momentum != 0
        }

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(input)
        called = False

        def measured(call: BatchNormCall) -> Tensor:
            nonlocal called
            if not self._is_inner_call(layer, call):
                called = True
                self._measure(layer, call)
            return call.run()

        version = _version(input)
        output = replace_batch_norm(measured, self._names[layer], forward, input, required=False)
        if not called and layer not in self.unmeasurable:
            # Compared at every call: a mask may change the next output.
            with torch.no_grad():
                if _version(input) == version and is_plain(layer, input, output):
                    self._measure(layer, plain_call(layer, input))
                else:
                    self.unmeasurable.add(layer)
        return output

    def _is_inner_call(self, layer: _BatchNorm, call: BatchNormCall) -> bool:
        mean = call.running_mean  # of an inner layer in timm's SplitBatchNorm2d
        return mean is not None and any(mean is m._buffers["running_mean"] for m in self._inner[layer])

    @torch.no_grad()
    def _measure(self, layer: _BatchNorm, call: BatchNormCall) -> None:
        input = call.input.detach()
        stored = layer._buffers["running_mean"]
        if stored is not None and input.shape[1] != len(stored):  # its channels do not match the stored ones
            self.unmeasurable.add(layer)
        elif call.values > 1 and (tracks(layer, call) or layer not in self._moving):
            self.calls.setdefault(layer, []).append(Call(Moments.of(input), vars(layer)["momentum"]))


class RecordMomenta(Behavior):
    """Record, on the host, the momentum of each call that a layer counts in ``num_batches_tracked``, since `begin`."""

    name = "momenta recorded"
    innermost = True

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.momenta: dict[_BatchNorm, list[float | None]] = {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        if not torch.compiler.is_compiling():
            own, momenta = vars(layer), self.momenta.setdefault(layer, [])
            if own["training"] and own["track_running_stats"]:
                momenta.append(own["momentum"])
        return forward(input)


def _version(input: Any) -> int:
    return input._version if isinstance(input, Tensor) and not input.is_inference() else 0
