"""Mini-batch inference: evaluation with the statistics of each mini-batch (paper, Sec. 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behavior import Behavior, Handle, has_behavior
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, changeable_layers
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm


def mini_batch_inference(model: nn.Module, *, layers: Layers = None) -> MiniBatchHandle:
    r"""Make BatchNorm layers normalize with the statistics of the mini-batch in eval mode, too.

    $y = \gamma (x - \mu_B) / \sigma_B + \beta$, as in training. The stored statistics are neither used nor changed. In
    train mode nothing changes.

    When it helps: a layer gets many rows of each image, as in an R-CNN head (box AP 30.7 -> 41.5 at one image per
    device, Table 3). When it does not: in a classifier, predictions depend on the other samples of the batch, and are
    better only at normalization batches of 4 and fewer (Fig. 5).

    An input with a single value per channel has no variance: it is normalized with the stored statistics, and counted
    in the handle's ``fallbacks``. Frozen layers (`freeze_bn`) keep using their stored statistics. A `SyncBatchNorm`
    uses the batch of its own rank. A layer in eval mode during training changes as well: exclude it by ``layers``.

    Args:
        model: The model.
        layers: Glob patterns over qualified layer names, such as ``"roi_heads.*"``; None takes every BatchNorm layer.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to evaluate with stored statistics again.

    Raises:
        ValueError: If a pattern matches nothing, or a layer has a conflicting feature or a forward on the instance.

    Example:
        >>> import torch
        >>> from lightning_bn import mini_batch_inference
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1, affine=False)).eval()
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> with mini_batch_inference(model) as handle:
        ...     model(x).flatten(), model(x[:1]).flatten(), handle.fallbacks
        (tensor([-1.0000,  1.0000]), tensor([1.0000]), 1)
        >>> model(x).flatten()
        tensor([1.0000, 3.0000])
    """
    chosen = changeable_layers(model, layers)
    check_conflicts(chosen, "mini-batch")
    return MiniBatchHandle(chosen)


class MiniBatch(Behavior):
    """In eval mode, normalizes like a layer without stored statistics (``track_running_stats=False``)."""

    kind = "mini-batch"
    name = "mini-batch statistics in eval"
    not_copied = (
        "A deep copy of a model under mini_batch_inference evaluates with stored statistics, as the plain model: call "
        "mini_batch_inference on the copy as well."
    )

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.fallbacks = 0
        self.min_rows: int | None = None
        self._names = {layer: name for name, layer in layers.items()}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        # A pass ("batch mode") normalizes with batch statistics anyway.
        if layer.training or layer.running_mean is None or has_behavior(layer, "frozen", "batch mode"):
            return forward(input)
        return replace_batch_norm(self._batch_norm, self._names[layer], forward, input)

    def _batch_norm(self, call: BatchNormCall) -> Tensor:
        rows = len(call.input)
        self.min_rows = rows if self.min_rows is None else min(rows, self.min_rows)
        if call.values > 1 and not call.training:
            return call.normalize_by_itself()
        if not call.training:
            self.fallbacks += call.values  # 0 for an input without rows, in which there is nothing to normalize
        return call.run()


class MiniBatchHandle(Handle):
    """Handle of layers under mini-batch inference."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._behavior = MiniBatch(layers)
        super().__init__(layers.values(), self._behavior)

    @property
    def fallbacks(self) -> int:
        """Number of layer calls with a single value per channel, which used the stored statistics."""
        return self._behavior.fallbacks

    @property
    def min_rows(self) -> int | None:
        """Rows of the smallest input that a layer got; None before the first."""
        return self._behavior.min_rows
