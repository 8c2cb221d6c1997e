"""Mini-batch inference: in evaluation, the layer normalises with the statistics of the batch it is given (Sec. 4.2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.batch_mode import BatchMode, lent
from lightning_bn.layers.behaviour import Behaviour, behaves
from lightning_bn.layers.frozen import Frozen


class MiniBatch(Behaviour):
    """In eval mode, as if the layer had no stored statistics (``track_running_stats=False``).

    A frozen layer stays frozen: its stored statistics are what it trains with. While a population is estimated
    (`BatchMode`) the layer is normalised with batch statistics anyway.

    Attributes:
        fallbacks: How often a layer was given a single value per channel, which has no variance, and normalised it
            with its stored statistics.
    """

    name = "mini-batch statistics in eval"
    not_copied = (
        "A deep copy of a model under mini_batch_inference evaluates with stored statistics, as the plain model: call "
        "mini_batch_inference on the copy as well."
    )

    def __init__(self) -> None:
        self.fallbacks = 0

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Normalise ``input`` with its own statistics, if the layer is in eval mode and they exist."""
        if layer.training or layer.running_mean is None or behaves(layer, Frozen, BatchMode):
            return forward(input)
        count = input.numel() // layer.num_features
        if count > 1:
            return lent(layer, forward, input, training=False, mean=None, var=None)
        self.fallbacks += count  # none for an input without rows, in which there is nothing to normalise
        return forward(input)
