"""Normalization batch size (NBS): the number of samples a layer normalizes together in training (paper, Sec. 2)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm

from lightning_bn.core.checks import check_int
from lightning_bn.core.ranks import get_world_size
from lightning_bn.layers.behavior import behaviors_of
from lightning_bn.layers.find import Layers, find_bn


def normalization_batch_size(model: nn.Module, *, samples: int, layers: Layers = None) -> dict[str, float]:
    """Return how many samples each BatchNorm layer normalizes together in training, as it is set up now.

    Error rises below 16, steeply from 8 down, where FrozenBN helps, and a little above 128 (paper, Fig. 5 and 6).

    | layer | NBS |
    |---|---|
    | BatchNorm | the samples of one device's batch |
    | under `sync_bn`, or torch's SyncBatchNorm | these, times the ranks that share statistics |
    | under `ghost_bn` | the samples of the largest group |
    | under `domain_bn` with ``train_statistics="domain"`` and domains per sample | its largest domain's |
    | frozen by `freeze_bn`, or in eval mode | NaN: it uses the population statistics |

    Gradient accumulation and the number of devices do not change it. It counts samples: a layer in a detector's head
    gets many rows per sample, and a layer on rows ``(N, C)`` makes ghost batches of at least two. If the model itself
    is in eval mode, all of its layers count as in train mode.

    Args:
        model: The model.
        samples: Samples in the batch of one device; all ranks are assumed to have as many.
        layers: Glob patterns over qualified layer names; None for every BatchNorm layer.

    Returns:
        Qualified name -> NBS.

    Raises:
        ValueError: If there is no BatchNorm layer, or a pattern matches nothing.

    Example:
        >>> from torch import nn
        >>> import lightning_bn as lbn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
        >>> handle = lbn.ghost_bn(model, size=32, layers="1")
        >>> lbn.normalization_batch_size(model, samples=256)
        {'1': 32, '3': 256}
    """
    check_int("samples", samples, at_least=1)
    sizes: dict[str, float] = {}
    for name, layer in find_bn(model, layers).items():
        size: float = samples
        if isinstance(layer, SyncBatchNorm):
            size *= get_world_size(cast("ProcessGroup | None", layer.process_group))
        for behavior in behaviors_of(layer):
            size = behavior.normalization_batch(size)
        sizes[name] = torch.nan if model.training and not layer.training else size
    return sizes
