"""SyncBN: one normalization batch over several ranks (paper, App. A.5 and A.6)."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn import SyncBatchNorm

from lightning_bn.core.checks import check_int
from lightning_bn.core.ranks import acquire_group, get_rank, get_world_size
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, changeable_layers
from lightning_bn.layers.synced import Synced


def sync_bn(model: nn.Module, *, group_size: int | None = None, layers: Layers = None) -> Handle:
    r"""Make BatchNorm layers normalize, in training, over the batches of several ranks as over one.

    With $n_r, \mu_r, \sigma_r^2$ count, mean and variance of a layer's input on rank $r$ of $k$, and $n = \sum_r n_r$,
    each of the $k$ ranks normalizes with

    $$\mu = \sum_r \frac{n_r}{n} \mu_r, \qquad
    \sigma^2 = \sum_r \frac{n_r}{n} \left( \sigma_r^2 + (\mu_r - \mu)^2 \right).$$

    Outputs, gradients and running statistics are those of one process with the batches of the $k$ ranks as one: the
    normalization batch size (NBS) is $k$ times the device batch. Ranks may hold batches of different size, or none.
    Unlike ``convert_sync_batchnorm`` this keeps the layers, their subclasses' own forward (timm's ``BatchNormAct2d``)
    and the state dict, acts on chosen layers, and runs on the CPU.

    When it helps: device batches under 16 (validation error with population statistics 32.5 % at NBS 2, 24.3 at 8,
    23.5 at 16; Fig. 5), and heads whose samples are correlated within a rank (Table 3: box AP 41.7 against 30.7). When
    it does not: from NBS 16 on error hardly changes and beyond 128 it rises (23.2 at 64, 23.7 at 1024), which is what
    ``ranks`` is for. Cost: two exchanges of a few numbers per channel for each layer and step, at which all ranks wait
    for the slowest.

    What it asks of you, under pain of ranks that wait for each other until torch.distributed gives up:

    - Every rank calls ``sync_bn`` and ``undo()`` alike, and runs as many train-mode forwards through the layers as the
      others, in the same order, with a batch of zero rows where it has none.
    - Every rank runs backward through what its layers returned, the empty one too. Compute its loss from the output as
      everywhere (``loss.sum() / max(len(loss), 1)``; a mean over nothing is NaN), or take ``0 * output.sum()``. DDP
      asks for that anyway. Inputs of a layer without trainable ``weight`` or ``bias`` require a gradient on all ranks
      or on none.

    Gradients of ``weight`` and ``bias`` are each rank's share, as with torch's SyncBatchNorm: DDP averages them. With
    fewer ``ranks`` than there are, groups have running statistics of their own, and DDP's ``broadcast_buffers`` passes
    on those of rank 0. Layers in eval mode and layers under `freeze_bn` take no part; `precise_bn` estimates synced
    layers as it does others. Where ``torch.compile`` comes to a synced layer in train mode, its graph breaks. Gradients
    can be differentiated again (a gradient penalty), by all ranks: with ``create_graph=True`` a layer's backward makes
    three exchanges instead of one.

    Args:
        model: The model, wrapped by DDP or not.
        group_size: So many ranks share statistics: the first ``group_size``, the next, and so on. None takes all. 1 changes
            nothing, as does running in one process, and warns.
        layers: Glob patterns over qualified layer names; None takes every BatchNorm layer. torch's own SyncBatchNorm
            layers are left alone by default: they do it already, over their own group.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to have each rank normalize by itself again.

    Raises:
        ValueError: If ``ranks`` does not divide the number of ranks, a pattern matches nothing, or a layer is synced
            already or is under `ghost_bn`.
        TypeError: If ``ranks`` is given for a SyncBatchNorm; at its first forward, if a layer computes without
            ``torch.nn.functional.batch_norm``.

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
        check_int("ranks", group_size, at_least=1)
    chosen = changeable_layers(model, layers)
    converted = [name for name, layer in chosen.items() if isinstance(layer, SyncBatchNorm)]
    if converted and group_size is not None:
        raise TypeError(
            f"Layer {converted[0]!r} is torch's SyncBatchNorm, which has a group of its own: leave it out by layers=, "
            "or do not convert it (sync_batchnorm=False) and let sync_bn do it."
        )
    chosen = {name: layer for name, layer in chosen.items() if name not in converted}
    check_conflicts(chosen, "sync", model)
    nothing = (
        "there is one process, so nothing to synchronize."
        if get_world_size() == 1
        else "group_size=1 is what BatchNorm does by itself. For less than the batch of one rank there is Ghost BN."
        if group_size == 1
        else "the layers are torch's SyncBatchNorm, which synchronize by themselves."
        if not chosen
        else None
    )
    if nothing:
        if get_rank() == 0:
            warnings.warn(f"sync_bn changes nothing: {nothing}", stacklevel=2)
        chosen, group_size = {}, None
    group, give_back = acquire_group(group_size or get_world_size())
    return Handle(chosen.values(), Synced(chosen, group), [give_back])
