"""Mini-batch inference: evaluate with the statistics of the batch at hand (paper, Sec. 4.2)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, changeable_layers
from lightning_bn.layers.mini_batch import MiniBatch


class MiniBatchHandle(Handle):
    """The way back from mini-batch inference, which also knows how often a batch was too small for it."""

    def __init__(self, layers: Iterable[nn.Module], behavior: MiniBatch) -> None:
        super().__init__(layers, behavior)
        self._behavior = behavior

    @property
    def fallbacks(self) -> int:
        """How many calls of a layer had one value per channel and so took the population's statistics."""
        return self._behavior.fallbacks


def mini_batch_inference(model: nn.Module, *, layers: Layers = None) -> MiniBatchHandle:
    r"""Make BatchNorm layers normalize, in eval mode too, with the statistics of the mini-batch they are given.

    In evaluation $y = \gamma (x - \mu_B) / \sigma_B + \beta$, as in training, so that the two are consistent. The
    stored statistics are neither used nor changed, nor is ``num_batches_tracked``. In train mode nothing changes.

    When it helps: where the population statistics fit training badly, as they do where normalization batches are
    small or not i.i.d. In an R-CNN head one image already brings 100 to 1000 regions, and trained with one image per
    device the box AP is 41.5 with mini-batch and 30.7 with population statistics (Mask R-CNN, BatchNorm in the box
    and mask heads; Table 3); at two images, 41.3 against 40.1. When it does not: for a classifier the prediction for
    one sample then depends on its neighbors in the test batch, so that results change with the size and the order of
    test batches and cannot be had for one sample; and it is better than population statistics only at normalization
    batches of 4 and fewer (validation error 26.0 against 32.5 % at 2, but 24.7 against 23.2 at 64; Fig. 5 and 6).

    A batch with a single value per channel has no variance: it is normalized with the stored statistics, and counted
    in the handle's ``fallbacks``. Frozen layers (`freeze_bn`) go on using their stored statistics, which they train
    with. A `SyncBatchNorm` takes the statistics of its own rank's batch: ranks need not evaluate equally many. A layer
    that is kept in eval mode while the model trains cannot be told from one that is evaluated: leave it out.

    Cost: that of a training forward, which reads the input once more.

    Args:
        model: The model.
        layers: Glob patterns over qualified layer names, such as ``"roi_heads.*"``; None takes every BatchNorm layer.
            Those without stored statistics (``track_running_stats=False``) do this already.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to evaluate with stored statistics again.

    Raises:
        ValueError: If a pattern matches nothing, a chosen layer's forward was replaced on the instance, or one has
            domains.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bn import mini_batch_inference
        >>> model = nn.Sequential(nn.BatchNorm1d(1, affine=False)).eval()
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> with mini_batch_inference(model) as handle:
        ...     model(x).flatten(), model(x[:1]).flatten(), handle.fallbacks
        (tensor([-1.0000,  1.0000]), tensor([1.0000]), 1)
        >>> model(x).flatten()
        tensor([1.0000, 3.0000])
    """
    chosen = changeable_layers(model, layers)
    check_conflicts(chosen, "mini-batch")
    return MiniBatchHandle(chosen.values(), MiniBatch(chosen))
