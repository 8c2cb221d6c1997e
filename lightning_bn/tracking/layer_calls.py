"""A record of the calls of layers: their momenta, and the moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


def ema_statistics(moments: Moments) -> Tensor:
    """Return mean and unbiased variance, ``(2, C)``, as running statistics take them."""
    return torch.stack([moments.mean, moments.m2 / (moments.count - 1)])


class RecordCalls(Behavior):
    """Records calls since `begin`, and changes nothing.

    Inactive in compiled regions: it would change what is compiled, and with it the last bits of results.
    """

    name = "calls recorded"
    innermost = True

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self._inner = {
            layer: [m for m in layer.modules() if isinstance(m, _BatchNorm) and m is not layer] for layer in self._names
        }
        self.unmeasurable: set[_BatchNorm] = set()
        self.begin((), ())

    def begin(self, counted: Iterable[_BatchNorm], measured: Iterable[_BatchNorm]) -> None:
        """Forget the last calls; record the momenta of ``counted`` layers and the inputs of ``measured`` ones."""
        self._counted, self._measured = set(counted), set(measured)
        # Layers that move nothing in training have all their inputs measured.
        self._moving = {m for m in self._measured if m.training and not is_frozen(m) and m.momentum != 0}
        self.momenta: dict[_BatchNorm, list[float | None]] = {}  # of the calls in num_batches_tracked
        self._inputs: dict[_BatchNorm, list[Call]] = {}

    def inputs(self, layer: _BatchNorm) -> list[Call]:
        """Return the inputs that moved the running statistics; of a layer that moves none in training, all."""
        return [] if layer in self.unmeasurable else self._inputs.get(layer, [])

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(input)
        if layer in self._counted:
            own, momenta = vars(layer), self.momenta.setdefault(layer, [])
            if own["training"] and own["track_running_stats"]:
                momenta.append(own["momentum"])
        return self._forward_measured(layer, forward, input) if layer in self._measured else forward(input)

    def _forward_measured(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        called = False

        def measured(call: BatchNormCall) -> Tensor:
            nonlocal called
            mean = call.running_mean  # of an inner layer in timm's SplitBatchNorm2d
            if mean is None or all(mean is not inner._buffers["running_mean"] for inner in self._inner[layer]):
                called = True
                self._measure(layer, call)
            return call.run()

        version = _version(input)
        output = replace_batch_norm(measured, self._names[layer], forward, input, required=False)
        if not called and layer not in self.unmeasurable:
            # Without a batch_norm call, the output tells if the layer is torch's. A mask may change the next output.
            with torch.no_grad():
                if _version(input) == version and is_plain(layer, input, output):
                    self._measure(layer, plain_call(layer, input))
                else:
                    self.unmeasurable.add(layer)
        return output

    @torch.no_grad()
    def _measure(self, layer: _BatchNorm, call: BatchNormCall) -> None:
        input, stored = call.input.detach(), layer._buffers["running_mean"]
        if stored is not None and input.shape[1] != len(stored):  # its channels do not match the stored ones
            self.unmeasurable.add(layer)
        elif call.values > 1 and (tracks(layer, call) or layer not in self._moving):
            self._inputs.setdefault(layer, []).append(Call(Moments.of(input), vars(layer)["momentum"]))


def _version(input: Any) -> int:
    return input._version if isinstance(input, Tensor) and not input.is_inference() else 0
