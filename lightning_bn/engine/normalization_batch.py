"""Normalization batch size (NBS): how many samples a layer normalises together in training (paper, Sec. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.distributed.moments import num_ranks
from lightning_bn.layers.frozen import is_frozen


def normalization_batch_size(layers: Mapping[str, _BatchNorm], samples: float) -> dict[str, float]:
    """NBS of each layer: the samples of the device's batch, times the ranks that a SyncBatchNorm pools.

    Accumulating gradients or training on several ranks does not change it. A frozen layer normalises with the
    population: NaN.

    Args:
        layers: Qualified name -> layer, in the modes of training.
        samples: Samples in a batch of this rank; NaN if that is not known.
    """
    return {name: samples * _ranks(layer) if _trains(layer) else torch.nan for name, layer in layers.items()}


def _ranks(layer: _BatchNorm) -> int:
    return num_ranks(cast("ProcessGroup | None", layer.process_group)) if isinstance(layer, SyncBatchNorm) else 1


def _trains(layer: _BatchNorm) -> bool:
    return layer.training and not is_frozen(layer)
