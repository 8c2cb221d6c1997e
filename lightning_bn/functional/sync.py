"""SyncBN: one normalization batch over several ranks (paper, App. A.5 and A.6)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.checks import check_int
from lightning_bn.core.compiler import disable_compile
from lightning_bn.core.ranks import acquire_group, get_rank, get_world_size
from lightning_bn.layers.behavior import Behavior, Handle, has_behavior
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, changeable_layers
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm
from lightning_bn.layers.sync_kernel import synced_batch_norm


def sync_bn(model: nn.Module, *, group_size: int | None = None, layers: Layers = None) -> Handle:
    r"""Make BatchNorm layers normalize, in training, over the batches of several ranks as over one.

    With $n_r, \mu_r, \sigma_r^2$ count, mean and variance of a layer's input on rank $r$, and $n = \sum_r n_r$,
    each rank normalizes with

    $$\mu = \sum_r \frac{n_r}{n} \mu_r, \qquad
    \sigma^2 = \sum_r \frac{n_r}{n} \left( \sigma_r^2 + (\mu_r - \mu)^2 \right).$$

    Outputs, gradients and running statistics are those of one process with all batches as one; batches may differ in
    size, or be empty. Unlike ``convert_sync_batchnorm`` this keeps the layers, the forward of subclasses (timm's
    ``BatchNormAct2d``) and the state dict, selects layers and ranks, and runs on the CPU. Layers in eval mode, frozen
    layers and passes of `precise_bn` do not synchronize.

    It helps for device batches below 16, and if the samples of a device are correlated (paper, Fig. 5 and Table 3).
    Each layer makes two exchanges of a few numbers per channel and step, four with ``create_graph=True``.
    ``torch.compile`` breaks the graph at a synced layer in train mode.

    Requirements (otherwise training deadlocks until the process-group timeout):

    - Every rank calls ``sync_bn`` and ``undo()``, and runs the same number of train-mode forwards through the layers,
      in the same order. A rank without data uses a batch of zero rows.
    - Every rank runs backward through the layers' outputs. On an empty batch use ``loss.sum() / max(len(loss), 1)``
      (a mean of nothing is NaN) or ``0 * output.sum()``. Inputs of a layer without trainable ``weight`` or ``bias``
      require a gradient on all ranks or on none.

    Gradients of ``weight`` and ``bias`` are each rank's share, as in torch's SyncBatchNorm; DDP averages them. With
    ``group_size`` each group has its own running statistics; DDP's ``broadcast_buffers`` distributes those of rank 0.

    Args:
        model: The model, wrapped by DDP or not.
        group_size: Number of consecutive ranks that share statistics; None takes all. With 1, or in one process,
            nothing changes and a warning is issued.
        layers: Glob patterns over qualified layer names; None selects every BatchNorm layer. torch's SyncBatchNorm
            layers are left unchanged: they already synchronize over their own group.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to normalize each rank's batch separately again.

    Raises:
        ValueError: If ``group_size`` does not divide the number of ranks, a pattern matches nothing, or a layer has a
            conflicting behavior (`sync_bn`, `ghost_bn`, `domain_bn`).
        TypeError: If ``group_size`` is given for a SyncBatchNorm; in its first forward, if a layer's class does not
            call ``torch.nn.functional.batch_norm``.

    Example:
        >>> import torch
        >>> from torch import distributed as dist, nn
        >>> from lightning_bn import sync_bn
        >>> def main():  # torchrun --nproc-per-node 2
        ...     dist.init_process_group("gloo")
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        ...     with sync_bn(model):
        ...         return model(torch.randn(3, 4))  # normalized over 6 rows
    """
    if group_size is not None:
        check_int("group_size", group_size, at_least=1)
    chosen = changeable_layers(model, layers)
    converted = [name for name, layer in chosen.items() if isinstance(layer, SyncBatchNorm)]
    if converted and group_size is not None:
        raise TypeError(
            f"Layer {converted[0]!r} is torch's SyncBatchNorm, which has its own group: exclude it by layers=, or do "
            "not convert it (sync_batchnorm=False) and let sync_bn synchronize it."
        )
    chosen = {name: layer for name, layer in chosen.items() if name not in converted}
    check_conflicts(chosen, "sync", model)
    world_size = get_world_size()
    reason = None
    if world_size == 1:
        reason = "there is one process."
    elif group_size == 1:
        reason = "group_size=1 is plain BatchNorm. To normalize less than a rank's batch use Ghost BN."
    elif not chosen:
        reason = "the layers are torch's SyncBatchNorm, which already synchronize."
    if reason:
        if get_rank() == 0:
            warnings.warn(f"sync_bn changes nothing: {reason}", stacklevel=2)
        chosen, group_size = {}, None
    group, release = acquire_group(group_size or world_size)
    return Handle(chosen.values(), Synced(chosen, group), [release])


class Synced(Behavior):
    """Uses batch statistics of all ranks of a group in training.

    In eval mode, batch mode and frozen layers no rank waits for another, whatever the order of behaviors.
    """

    kind = "sync"

    def __init__(self, layers: Mapping[str, _BatchNorm], group: ProcessGroup | None) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self.group = group
        self.world_size = get_world_size(group)
        self.name = f"synced over {self.world_size} ranks"

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        if not layer.training or has_behavior(layer, "batch mode"):
            return forward(input)
        return self._over_ranks(layer, forward, input)

    def normalization_batch(self, samples: float) -> float:
        return samples * self.world_size

    @disable_compile
    def _over_ranks(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        return replace_batch_norm(self._batch_norm, self._names[layer], forward, input)

    def _batch_norm(self, call: BatchNormCall) -> Tensor:
        # an inner behavior may have frozen the layer
        return synced_batch_norm(call, self.group) if call.training else call.run()
