"""Mini-batch inference: in evaluation, the layer normalizes with the statistics of the batch it is given (Sec. 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behavior import Behavior, has_behavior
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm


class MiniBatch(Behavior):
    """In eval mode, as if the layer had no stored statistics (``track_running_stats=False``).

    A frozen layer stays frozen: its stored statistics are what it trains with. While a population is estimated
    (`BatchMode`) the layer is normalized with batch statistics anyway.

    Args:
        layers: Qualified name -> layer.

    Attributes:
        fallbacks: How often a layer was given a single value per channel, which has no variance, and normalized it
            with its stored statistics.
    """

    kind = "mini-batch"
    name = "mini-batch statistics in eval"
    not_copied = (
        "A deep copy of a model under mini_batch_inference evaluates with stored statistics, as the plain model: call "
        "mini_batch_inference on the copy as well."
    )

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.fallbacks = 0
        self._names = {layer: name for name, layer in layers.items()}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Run the layer's own forward; in eval mode, with its input's own statistics, if they exist."""
        if layer.training or layer.running_mean is None or has_behavior(layer, "frozen", "batch mode"):
            return forward(input)
        return replace_batch_norm(self._batch_norm, self._names[layer], forward, input)

    def _batch_norm(self, call: BatchNormCall) -> Tensor:
        if call.training:
            return call.run()
        if call.values > 1:
            return call.normalize_by_itself()
        self.fallbacks += call.values  # none for an input without rows, in which there is nothing to normalize
        return call.run()
