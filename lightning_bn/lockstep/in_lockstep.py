"""In lockstep: the layer normalizes its input with statistics that it gets from elsewhere, of many inputs together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import batch_statistics
from lightning_bn.layers.batch_mode import BatchMode
from lightning_bn.layers.override import BatchNormCall


class InputMoments(NamedTuple):
    """What an input brings to a layer.

    Attributes:
        values: How many values per channel.
        mean: Their mean, ``(C,)``.
        var: Their biased variance, ``(C,)``.
        counts: Whether they count for the population, and not only for this normalization.
    """

    values: int
    mean: Tensor
    var: Tensor
    counts: bool = True

    def of_nothing(self) -> InputMoments:
        """The same for an input that is not to count."""
        return InputMoments(0, torch.zeros_like(self.mean), torch.zeros_like(self.var), self.counts)


SyncStatistics: TypeAlias = Callable[[str, InputMoments], tuple[Tensor, Tensor]]
"""Takes a layer's name and what its input brings; returns the mean and biased variance to normalize it with."""


class InLockstep(BatchMode):
    """Normalize each input with the statistics that ``exchange`` returns; without it, in batch mode."""

    name = "in lockstep"
    exchange: SyncStatistics | None = None

    def record(self, layer: _BatchNorm, domain: int | None, input: Tensor, counts: bool) -> None:
        """Bring the statistics of one domain's part of an input, and wait for those of all."""
        if self.exchange is None:
            super().record(layer, domain, input, counts)
        else:
            self.exchange(self.name_of(layer, domain), _moments_of(input, input.shape[1], counts))

    def _normalize(self, layer: _BatchNorm, call: BatchNormCall, counts: bool) -> Tensor:
        """Bring the statistics of an input, wait for those of all, and normalize."""
        if self.exchange is None:
            return super()._normalize(layer, call, counts)
        name = self.name_of(layer)
        self._check_channels(name, call)
        brought = _moments_of(call.input, call.input.shape[1], counts)
        return call.normalize_with(*(v.to(call.input.device) for v in self.exchange(name, brought)))


@torch.no_grad()
def _moments_of(input: Tensor, channels: int, counts: bool) -> InputMoments:
    values = input.numel() // channels
    mean, var = batch_statistics(input) if values else input.new_zeros(2, channels)
    return InputMoments(values, mean, var, counts)
