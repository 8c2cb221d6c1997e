"""In lockstep: the layer normalises its input with statistics that it gets from elsewhere, of many inputs together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.batch_mode import BatchMode, lent
from lightning_bn.layers.batch_norm_call import with_batch_norm
from lightning_bn.statistics.moments import batch_statistics


class Brought(NamedTuple):
    """What an input brings to a layer: how many values per channel, their mean and biased variance."""

    values: int
    mean: Tensor
    var: Tensor

    def of_nothing(self) -> Brought:
        """The same for an input that is not to count."""
        return Brought(0, torch.zeros_like(self.mean), torch.zeros_like(self.var))


Arrive: TypeAlias = Callable[[str, Brought], tuple[Tensor, Tensor]]
"""Takes a layer's name and what its input brings; returns the mean and biased variance to normalise it with."""


class InLockstep(BatchMode):
    """Normalise each input with the statistics that ``arrive`` returns; in batch mode while there is no ``arrive``."""

    name = "in lockstep"
    arrive: Arrive | None = None

    def bring(self, layer: _BatchNorm, domain: int, input: Tensor) -> None:
        """Bring the statistics of one domain's part of an input, and wait for those of all."""
        if self.arrive is None:
            super().bring(layer, domain, input)
        else:
            self.arrive(self.name_of(layer, domain), _brought(layer, input))

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Bring the statistics of ``input``, wait for those of all, and normalise."""
        if self.arrive is None:
            return super().forward(layer, forward, input)
        name = self.name_of(layer)
        mean, var = (v.to(input.device) for v in self.arrive(name, _brought(layer, input)))
        stored = cast(Tensor, layer._buffers["running_mean"])
        if stored.element_size() > 2:
            return lent(layer, forward, input, False, mean.to(stored.dtype), var.to(stored.dtype))

        # 16-bit buffers would round the statistics before they are used
        def wide(
            input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
            training: bool, momentum: float, eps: float,
        ) -> Tensor:  # fmt: skip
            weight, bias = (p if p is None else p.to(mean.dtype) for p in (weight, bias))
            return F.batch_norm(input.to(mean.dtype), mean, var, weight, bias, eps=eps).to(input.dtype)

        return with_batch_norm(wide, name, lambda input: lent(layer, forward, input, False, mean, var), input)


@torch.no_grad()
def _brought(layer: _BatchNorm, input: Tensor) -> Brought:
    count = input.numel() // layer.num_features
    return Brought(count, *(batch_statistics(input) if count else input.new_zeros(2, layer.num_features)))
