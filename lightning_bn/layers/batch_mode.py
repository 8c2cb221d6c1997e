"""Batch mode: the layer normalises each input with that input's own statistics, and reports them.

Where torch's training kernel is accurate, it is lent scratch buffers with momentum 1, so that the batch statistics
come out of the normalisation itself and nothing is read twice. Elsewhere the statistics are taken first, and lent to
the layer as its stored ones while its own forward runs in eval mode. Either way the layer's own buffers are never
written, and every subclass works whose forward honours modes and buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.distributed.moments import merge_over_ranks
from lightning_bn.layers.behaviour import Behaviour, behaviours_of
from lightning_bn.statistics.moments import Moments, batch_statistics, kernel_was_accurate, may_use_kernel
from lightning_bn.statistics.population import Accumulator


class BatchMode(Behaviour):
    """Normalise each input with its own batch statistics, in any mode of the layer, and put them into slots.

    Args:
        layers: Qualified name -> layer.
        seen: Where the statistics go.
    """

    name = "in batch mode"

    def __init__(self, layers: dict[str, _BatchNorm], seen: Accumulator) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self._seen = seen
        self.counts = True
        """Whether what the layers are shown counts; a forward run only to keep other ranks company does not."""

    def name_of(self, layer: _BatchNorm, domain: int | None = None) -> str:
        """Under which name a layer's statistics go, those of a domain under one of their own."""
        domains = (domain, *(b.domain(layer) for b in behaviours_of(layer)))
        return of_domain(self._names[layer], next((d for d in domains if d is not None), None))

    def bring(self, layer: _BatchNorm, domain: int, input: Tensor) -> None:
        """Put the statistics of one domain's part of an input into a slot; the layer is not run."""
        count = input.numel() // layer.num_features
        if self.counts and count:
            mean, var = batch_statistics(input.detach())
            slot = self._seen.slot(self.name_of(layer, domain), count)
            slot[0].copy_(mean)
            slot[1].copy_(var * (count / max(count - 1, 1)))

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Normalise ``input`` with its own statistics; an input without rows has none, and needs none."""
        count = input.numel() // layer.num_features
        group = cast("ProcessGroup | None", layer.process_group) if isinstance(layer, SyncBatchNorm) else None
        synced = isinstance(layer, SyncBatchNorm)  # in train mode its own forward insists on CUDA and a batch counter
        slot = self._seen.slot(self.name_of(layer), count) if self.counts and count else None
        stored = cast(Tensor, layer._buffers["running_mean"])
        if slot and count > 1 and slot[0].dtype == stored.dtype and not synced and may_use_kernel(input):
            output = lent(layer, forward, input, True, *slot, momentum=1.0)
            if kernel_was_accurate(input, *slot):
                return output
        with torch.no_grad():  # the user's forward may have gradients of its own
            mean, var = batch_statistics(input) if count else input.new_zeros(2, layer.num_features)
            if slot:
                slot[0].copy_(mean)
                slot[1].copy_(var * (count / max(count - 1, 1)))
        if synced:
            weight = mean.new_tensor(count * self.counts).double()
            pooled = merge_over_ranks(Moments(weight, mean.double(), var.double() * weight), group)
            mean, var = pooled.mean, pooled.var
        elif count > 1 and stored.element_size() == 2:
            # 16-bit buffers would round the statistics before they are used: the kernel takes its own once more
            return lent(layer, forward, input, True, None, None)
        return lent(layer, forward, input, False, mean.to(stored.dtype), var.to(stored.dtype))


def of_domain(name: str, domain: int | None) -> str:
    """The name under which the statistics of one of a layer's domains are measured."""
    return name if domain is None else f"{name}@{domain}"


def lent(
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
