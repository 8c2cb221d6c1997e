"""Batch mode: the layer normalizes each input with that input's own statistics, and reports them.

Where torch's training kernel is accurate, it is lent scratch buffers with momentum 1, so that the batch statistics
come out of the normalization itself and nothing is read twice. Elsewhere the statistics are taken first, and used for
the normalization. Either way the layer's own buffers are never written: torch's own classes are answered with their
known computation, and the forward of any other class gets copies of its buffers to write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import Moments, batch_statistics, kernel_was_accurate, may_use_kernel
from lightning_bn.core.population import Accumulator
from lightning_bn.core.ranks import merge_over_ranks
from lightning_bn.layers.behavior import Behavior, behaviors_of, own_class
from lightning_bn.layers.override import PLAIN, BatchNormCall, plain_call, raise_not_visible, replace_batch_norm, tracks


class BatchMode(Behavior):
    """Normalize each input with its own batch statistics, and put those of the inputs that count into slots.

    Args:
        layers: Qualified name -> layer.
        seen: Where the statistics go.
        of_training: Which inputs count: those that would have moved the layer's running statistics in training; a call
            in eval mode then uses the stored ones. If False, the inputs of all calls, whatever the mode.
    """

    kind = "batch mode"
    name = "in batch mode"

    def __init__(self, layers: dict[str, _BatchNorm], seen: Accumulator, of_training: bool = True) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self._seen = seen
        self._of_training = of_training
        self._plain = {layer for layer in layers.values() if own_class(layer) in PLAIN}
        self._buffers = {layer: dict(layer._buffers) for layer in layers.values()}
        self.counts = True
        """Whether what the layers are shown counts; a forward run only to keep other ranks company does not."""

    def name_of(self, layer: _BatchNorm, domain: int | None = None) -> str:
        """Under which name a layer's statistics go, those of a domain under one of their own."""
        behaviors = behaviors_of(layer)
        if domain is None and len(behaviors) > 1:
            domain = next((d for b in behaviors if (d := b.domain(layer)) is not None), None)
        return of_domain(self._names[layer], domain)

    def is_by_batch(self, layer: _BatchNorm) -> bool:
        """Whether a layer is in batch mode at the moment, and not set to its stored statistics by the step."""
        return not self._of_training or layer.training

    def takes(self, layer: _BatchNorm, call: BatchNormCall) -> bool:
        """Whether the statistics of a call's input count."""
        return not self._of_training or tracks(layer, call)

    def record(self, layer: _BatchNorm, domain: int | None, input: Tensor, counts: bool) -> None:
        """Put the statistics of one domain's part of what a call is given into a slot; the layer is not run."""
        count = input.numel() // input.shape[1]
        if counts and self.counts and count:
            self._fill(self._seen.slot(self.name_of(layer, domain), count), *batch_statistics(input.detach()), count)

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Normalize what the layer's ``batch_norm`` call is given with its own statistics."""
        own = vars(layer)
        if self._of_training and not own["training"]:  # set by the step: it uses the stored statistics here
            return forward(input)
        if layer in self._plain and len(behaviors_of(layer)) == 1:
            layer._check_input_dim(input)
            return self._answer(layer, plain_call(layer, input))
        output, called = self._watched(layer, forward, input)
        if called:
            return output
        # a hand-written forward makes no such call: if its output is what torch's would be, it normalizes its input.
        # What it does to one input says nothing of the next: there may be a mask.
        if not is_plain(layer, input, output):
            raise_not_visible(self._names[layer])
        return self._answer(layer, plain_call(layer, input))

    def _watched(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> tuple[Any, bool]:
        """What the layer's forward returns, and whether it has called ``batch_norm`` for that."""
        own, buffers, called = vars(layer), layer._buffers, False
        training, synced = own["training"], isinstance(layer, SyncBatchNorm)
        # a subclass may count batches and write its statistics itself: it does so to copies
        copies = {key: value if value is None else value.clone() for key, value in self._buffers[layer].items()}

        def instead(call: BatchNormCall) -> Tensor:
            nonlocal called
            called = True
            if synced and training:  # in eval mode its own forward gives a momentum of 0 for None
                own["training"], call = True, call._replace(training=True, momentum=1.0)
            output = self._answer(layer, call)
            buffers.update(copies)  # a forward that this one has waited for had its own there
            return output

        buffers.update(copies)
        if synced:  # in train mode its own forward insists on CUDA, before it comes to its call
            own["training"] = False
        try:
            return replace_batch_norm(instead, self._names[layer], forward, input, required=False), called
        finally:
            buffers.update(self._buffers[layer])
            if synced:
                own["training"] = training

    def _answer(self, layer: _BatchNorm, call: BatchNormCall) -> Tensor:
        if self._of_training and not call.training:
            return call.run()
        return self._normalize(layer, call, self.takes(layer, call))

    def _normalize(self, layer: _BatchNorm, call: BatchNormCall, counts: bool) -> Tensor:
        """Normalize an input with its own statistics; an input without rows has none, and needs none."""
        input, count = call.input, call.values
        slot = self._slot(layer, call) if counts and self.counts and count else None
        synced = isinstance(layer, SyncBatchNorm)
        dtype = (input if call.weight is None else call.weight).dtype
        if slot and count > 1 and slot[0].dtype == dtype and not synced and may_use_kernel(input):
            output = F.batch_norm(input, *slot, call.weight, call.bias, True, 1.0, call.eps)
            if kernel_was_accurate(input, *slot):
                return output
        with torch.no_grad():  # the user's forward may have gradients of its own
            mean, var = batch_statistics(input) if count else input.new_zeros(2, input.shape[1])
            if slot:
                self._fill(slot, mean, var, count)
        if synced:
            weight = mean.new_tensor(count * self.counts).double()
            group = cast("ProcessGroup | None", layer.process_group)
            pooled = merge_over_ranks(Moments(weight, mean.double(), var.double() * weight), group)
            mean, var = pooled.mean, pooled.var
        elif count > 1 and dtype.itemsize == 2:
            return call.normalize_by_itself()  # as torch does in training: bit by bit what the next layers train on
        return call.normalize_with(mean, var)

    def _slot(self, layer: _BatchNorm, call: BatchNormCall) -> tuple[Tensor, Tensor]:
        name = self.name_of(layer)
        self._check_channels(name, call)
        return self._seen.slot(name, call.values)

    def _check_channels(self, name: str, call: BatchNormCall) -> None:
        stored, given = self._seen.channels[name], call.input.shape[1]
        if stored != given:
            raise TypeError(
                f"Layer {name!r} stores statistics of {stored} channels, and its forward normalizes {given}: which of "
                "them belong together cannot be told. Leave it out by layers=."
            )

    @staticmethod
    def _fill(slot: tuple[Tensor, Tensor], mean: Tensor, var: Tensor, count: int) -> None:
        slot[0].copy_(mean)
        slot[1].copy_(var * (count / max(count - 1, 1)))


def is_plain(layer: _BatchNorm, input: Any, output: Any) -> bool:
    """Whether a layer has made of its input what torch's own would have, but for rounding."""
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
        return True  # there is nothing to compare, and the batch is left out
    expected = call.normalize_with(mean, var)
    eps = max(torch.finfo(x.dtype).eps for x in (input, output, expected))
    lost = float((1 + mean.square() / (var + call.eps)).amax())  # digits, in the textbook's E[x^2] - E[x]^2
    return bool(((output - expected).abs() <= min(64 * eps * lost, 1e-2) * expected.abs().amax()).all())


def of_domain(name: str, domain: int | None) -> str:
    """The name under which the statistics of one of a layer's domains are measured."""
    return name if domain is None else f"{name}@{domain}"


def forward_with_buffers(
    layer: _BatchNorm,
    forward: Callable[[Tensor], Tensor],
    input: Tensor,
    training: bool,
    mean: Tensor | None,
    var: Tensor | None,
    momentum: float | None = None,
) -> Tensor:
    """The layer's own forward in another mode, with other buffers; past the slow ``nn.Module.__setattr__``."""
    own, buffers = vars(layer), layer._buffers
    kept = {"training": own["training"], "momentum": own["momentum"]}, dict(buffers)
    own.update(training=training, momentum=momentum)
    buffers.update(running_mean=mean, running_var=var, num_batches_tracked=None)
    try:
        return forward(input)
    finally:
        own.update(kept[0])
        buffers.update(kept[1])
