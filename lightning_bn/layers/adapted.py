"""AdaBN: the layer normalises with the statistics of the target domain (paper, Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.batch_mode import BatchMode, lent
from lightning_bn.layers.behaviour import Behaviour, behaves
from lightning_bn.layers.frozen import Frozen
from lightning_bn.statistics.moments import Moments, batch_statistics
from lightning_bn.statistics.prior import with_prior


class Adapted(Behaviour):
    """A mark: the stored statistics are a target domain's, until they are put back."""

    name = "adapted"

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Do as ever."""
        return forward(input)


class Adapting(Behaviour):
    """In eval mode, the statistics of every input so far, the current one included; nothing is written.

    As long as no more than one value per channel came, which has no variance, it is the stored statistics.

    Args:
        prior_samples: How many samples the stored statistics are worth.

    Attributes:
        samples: Samples of the target domain so far, those of the current batch included; whoever runs the model says.
        nonfinite: Inputs with a NaN or infinite value, which are left out: they would spoil all that come after them.
    """

    name = "adapting"

    def __init__(self, prior_samples: int) -> None:
        self.prior_samples = prior_samples
        self.samples = self.nonfinite = 0
        self._seen: dict[_BatchNorm, tuple[int, Moments]] = {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Add ``input`` to what was seen, and normalise it with all of that."""
        stored_mean, stored_var = layer.running_mean, layer.running_var
        if layer.training or stored_mean is None or stored_var is None or behaves(layer, Frozen, BatchMode):
            return forward(input)
        count = input.numel() // layer.num_features
        if count:
            self._add(layer, input, count)
        total, seen = self._seen.get(layer, (0, None))
        if seen is None or total < 2:
            return forward(input)
        mean, var = (
            with_prior(source.double(), target, self.prior_samples, self.samples).to(source.dtype)
            for source, target in ((stored_mean, seen.mean), (stored_var, seen.var))
        )
        return lent(layer, forward, input, False, mean, var)

    def _add(self, layer: _BatchNorm, input: Tensor, count: int) -> None:
        mean, var = batch_statistics(input)
        if not torch.stack([mean, var]).isfinite().all():
            self.nonfinite += 1
            return
        moments = Moments(mean.new_tensor(count).double(), mean.double(), var.double() * count)
        before, seen = self._seen.get(layer, (0, None))
        self._seen[layer] = before + count, moments if seen is None else seen + moments
