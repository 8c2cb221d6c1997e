"""Batch mode: a layer normalizes each input with that input's own statistics, and measures them.

Where torch's training kernel is accurate, it fills scratch buffers with momentum 1 while it normalizes. Elsewhere the
input is measured first. The layer's own buffers are never written: torch's own classes are replaced by their known
computation, and the forward of any other class gets copies of its buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import (
    MAX_KERNEL_ROWS,
    MAX_KERNEL_SHIFT,
    Moments,
    batch_statistics,
    kernel_was_accurate,
    may_use_kernel,
)
from lightning_bn.core.population import Accumulator
from lightning_bn.core.ranks import merge_over_ranks
from lightning_bn.layers.behavior import Behavior, behaviors_of
from lightning_bn.layers.override import PLAIN, BatchNormCall, plain_call, raise_not_visible, replace_batch_norm, tracks

SyncStatistics: TypeAlias = Callable[[str, Moments, bool], tuple[Tensor, Tensor]]
"""Takes a layer's name, its input's moments, and if they are tracked; returns mean and biased variance to use."""


class BatchMode(Behavior):
    """Normalizes each input with its own batch statistics, and accumulates those of the inputs that are tracked.

    With ``of_training``, the tracked inputs are those that would move the running statistics in training, and a call in
    eval mode uses the stored ones. Without, they are the inputs of all calls.

    Attributes:
        is_padding: Whether the current batch only matches the other ranks' collectives, and is not measured.
        exchange: Returns the statistics to normalize with; None takes the input's own.
    """

    kind = "batch mode"
    name = "in batch mode"
    exchange: SyncStatistics | None = None
    is_padding = False

    def __init__(self, layers: dict[str, _BatchNorm], accumulator: Accumulator, of_training: bool = True) -> None:
        self.accumulator = accumulator
        self._dtype = accumulator.dtype
        self._names = {layer: name for name, layer in layers.items()}
        self._of_training = of_training
        self._buffers = {layer: dict(layer._buffers) for layer in layers.values()}
        self._plain = {layer for layer in layers.values() if type(layer) in PLAIN}  # without other behaviors
        # for the fast path in `forward`; layers on another device than the slots do not take it
        self._slots = {
            layer: accumulator.slots[self._names[layer]]
            for layer in self._plain
            if (mean := cast(Tensor, layer.running_mean)).device == accumulator.device and (mean.is_cpu or mean.is_cuda)
        }

    def name_of(self, layer: _BatchNorm, domain: int | None = None) -> str:
        """Return the name under which a layer's statistics are accumulated; each domain has its own."""
        behaviors = behaviors_of(layer)
        if domain is None and len(behaviors) > 1:
            domain = next((d for b in behaviors if (d := b.domain(layer)) is not None), None)
        return of_domain(self._names[layer], domain)

    def is_by_batch(self, layer: _BatchNorm) -> bool:
        """Return False if the step has set the layer to its stored statistics."""
        return not self._of_training or layer.training

    def takes(self, layer: _BatchNorm, call: BatchNormCall) -> bool:
        """Return True if the statistics of a call's input are tracked."""
        return not self._of_training or tracks(layer, call)

    def record(self, layer: _BatchNorm, domain: int | None, input: Tensor, is_tracked: bool) -> None:
        """Accumulate the statistics of one domain's part of an input; the layer is not run."""
        name, count = self.name_of(layer, domain), input.numel() // input.shape[1]
        if self.exchange is not None:
            self.exchange(name, self._moments_of(input), is_tracked)
        elif is_tracked and not self.is_padding and count:
            self._fill(self.accumulator.slot(name, count), *batch_statistics(input.detach()), count)

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        own = vars(layer)
        if self._of_training and not own["training"]:  # set by the step: it uses the stored statistics here
            return forward(input)
        if layer not in self._plain or len(own["_behaviors"]) > 1:
            return self._forward_of_other(layer, forward, input)
        layer._check_input_dim(input)
        # the fast path of most calls; `_normalize` does the same in general
        slots, weight, count = self._slots.get(layer), own["_parameters"]["weight"], input.numel() // input.shape[1]
        if (
            slots is not None
            and count > 1
            and self.exchange is None
            and not self.is_padding
            and (not self._of_training or (own["track_running_stats"] and own["momentum"]))
            and (input.dtype is self._dtype or (input.is_cuda and weight is not None))
            and (weight is None or weight.dtype is self._dtype)
            and len(slots.counts) < len(slots.views)
        ):
            mean, var = slots.views[len(slots.counts)]
            is_accurate = input.is_cuda or count <= slots.accurate_count or (input.ndim > 2 and input.is_contiguous())
            if (is_accurate or count <= MAX_KERNEL_ROWS) and input.shape[1] == len(mean):
                bias, cudnn = own["_parameters"]["bias"], torch.backends.cudnn.enabled
                output = torch.batch_norm(input, weight, bias, mean, var, True, 1.0, own["eps"], cudnn)
                # only asked at first: later inputs are averaged with it, so their errors count in its sigma
                if is_accurate or not (mean.square() * count**2 > MAX_KERNEL_SHIFT * var).any():
                    slots.counts.append(count)
                    if not is_accurate:
                        slots.accurate_count = count
                    if not slots.is_reached:
                        slots.is_reached = True
                        self.accumulator.order.append(slots)
                    return output
        return self._answer(layer, plain_call(layer, input))

    def _forward_of_other(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        output, is_called = self._watched(layer, forward, input)
        if is_called:
            return output
        # a hand-written forward without such a call: it normalizes its input if its output equals torch's. This is
        # checked for every input, because there may be a mask
        if not is_plain(layer, input, output):
            raise_not_visible(self._names[layer])
        return self._answer(layer, plain_call(layer, input))

    def _watched(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> tuple[Any, bool]:
        # returns the output, and whether the forward has called `batch_norm` for it
        own, buffers, is_called = vars(layer), layer._buffers, False
        training, synced = own["training"], isinstance(layer, SyncBatchNorm)
        # a subclass may write counts and statistics itself, to copies
        copies = {key: value if value is None else value.clone() for key, value in self._buffers[layer].items()}

        def instead(call: BatchNormCall) -> Tensor:
            nonlocal is_called
            is_called = True
            if synced and training:  # in eval mode its own forward passes a momentum of 0 for None
                own["training"], call = True, call._replace(training=True, momentum=1.0)
            output = self._answer(layer, call)
            buffers.update(copies)  # another forward that ran meanwhile has put its own there
            return output

        buffers.update(copies)
        if synced:  # in train mode its own forward insists on CUDA before its call
            own["training"] = False
        try:
            return replace_batch_norm(instead, self._names[layer], forward, input, required=False), is_called
        finally:
            buffers.update(self._buffers[layer])
            if synced:
                own["training"] = training

    def _answer(self, layer: _BatchNorm, call: BatchNormCall) -> Tensor:
        if self._of_training and not call.training:
            return call.run()
        name, stored = self.name_of(layer), self.accumulator.channels[self._names[layer]]
        if stored != call.input.shape[1]:
            raise TypeError(
                f"Layer {name!r} stores statistics of {stored} channels, and its forward normalizes "
                f"{call.input.shape[1]}: lightning_bn cannot match them. Leave it out by layers=."
            )
        if self.exchange is not None:
            mean, var = self.exchange(name, self._moments_of(call.input), self.takes(layer, call))
            return call.normalize_with(mean.to(call.input.device), var.to(call.input.device))
        return self._normalize(layer, name, call)

    def _normalize(self, layer: _BatchNorm, name: str, call: BatchNormCall) -> Tensor:
        input, count = call.input, call.values
        is_tracked = self.takes(layer, call) and not self.is_padding and count > 0
        slot = self.accumulator.slot(name, count) if is_tracked else None
        synced = isinstance(layer, SyncBatchNorm)
        dtype = (input if call.weight is None else call.weight).dtype
        if slot and count > 1 and slot[0].dtype == dtype and not synced and may_use_kernel(input):
            output = call._replace(running_mean=slot[0], running_var=slot[1], training=True, momentum=1.0).run()
            if kernel_was_accurate(input, *slot):
                return output
        with torch.no_grad():  # gradients may be enabled in the user's forward
            mean, var = batch_statistics(input) if count else input.new_zeros(2, input.shape[1])
            if slot:
                self._fill(slot, mean, var, count)
        if synced:
            weight = mean.new_tensor(count * (not self.is_padding)).double()
            group = cast("ProcessGroup | None", layer.process_group)
            pooled = merge_over_ranks(Moments(weight, mean.double(), var.double() * weight), group)
            mean, var = pooled.mean, pooled.var
        elif count > 1 and dtype.itemsize == 2:
            return call.normalize_by_itself()  # as torch does in training, bit by bit
        return call.normalize_with(mean, var)

    @torch.no_grad()
    def _moments_of(self, input: Tensor) -> Moments:
        count = input.numel() // input.shape[1]
        mean, var = batch_statistics(input) if count else input.new_zeros(2, input.shape[1])
        mean, var = (v.to(self.accumulator.device).double() for v in (mean, var))
        return Moments(torch.tensor(float(count), dtype=torch.float64, device="cpu"), mean, var * count)

    @staticmethod
    def _fill(slot: tuple[Tensor, Tensor], mean: Tensor, var: Tensor, count: int) -> None:
        slot[0].copy_(mean)
        slot[1].copy_(var * (count / max(count - 1, 1)))


def is_plain(layer: _BatchNorm, input: Any, output: Any) -> bool:
    """Return True if a layer's output is that of torch's own layer, except for rounding."""
    if not isinstance(input, Tensor) or not isinstance(output, Tensor) or input.shape != output.shape:
        return False
    if input.ndim < 2 or input.shape[1] != layer.num_features:
        return False
    call = plain_call(layer, input)
    if not call.values:
        return True
    mean, var = call.running_mean, call.running_var
    if call.training or mean is None or var is None:
        mean, var = batch_statistics(input)
    if not (mean.isfinite() & var.isfinite()).all():
        return True  # not comparable, and the batch is left out
    expected = call.normalize_with(mean, var)
    eps = max(torch.finfo(x.dtype).eps for x in (input, output, expected))
    lost = float((1 + mean.square() / (var + call.eps)).amax())  # digits, in the textbook's E[x^2] - E[x]^2
    return bool(((output - expected).abs() <= min(64 * eps * lost, 1e-2) * expected.abs().amax()).all())


def of_domain(name: str, domain: int | None) -> str:
    """Return the name under which the statistics of one of a layer's domains are accumulated."""
    return name if domain is None else f"{name}@{domain}"


def forward_with_buffers(
    layer: _BatchNorm,
    forward: Callable[[Tensor], Tensor],
    input: Tensor,
    training: bool,
    mean: Tensor | None,
    var: Tensor | None,
) -> Tensor:
    """Run the layer's own forward in another mode with other buffers; bypasses the slow ``nn.Module.__setattr__``."""
    own, buffers = vars(layer), layer._buffers
    flags, stored = {"training": own["training"], "momentum": own["momentum"]}, dict(buffers)
    own.update(training=training, momentum=None)
    buffers.update(running_mean=mean, running_var=var, num_batches_tracked=None)
    try:
        return forward(input)
    finally:
        own.update(flags)
        buffers.update(stored)
