"""Normalization batch size (NBS): how many samples a layer normalizes together in training (paper, Sec. 2)."""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.batch_sizes import infer_batch_size
from lightning_bn.core.ranks import get_world_size
from lightning_bn.layers.behavior import behaviors_of
from lightning_bn.layers.find import Layers, find_bn
from lightning_bn.trainer.compat import current_train_batch, train_loaders
from lightning_bn.trainer.context import modes_of_training


def normalization_batch_size(
    trainer: Trainer, module: LightningModule, *, samples: int | None = None, layers: Layers = None
) -> dict[str, float]:
    """How many samples each BatchNorm layer normalizes together in training, as it is set up at the moment.

    What the paper's Fig. 5 and 6 are about: below 16 error rises, from 8 down steeply, and FrozenBN helps; above 128 it
    rises a little.

    | layer | NBS |
    |---|---|
    | BatchNorm | the samples of the batch of one device |
    | under `sync_bn`, or torch's SyncBatchNorm | these, times the ranks that share statistics |
    | under `ghost_bn` | the samples of the largest group |
    | under `domain_bn` with ``sgd="domain"``, of datasets told apart by sample | those of the batch's largest domain |
    | frozen by `freeze_bn`, or in eval mode | NaN: it normalizes with the population |

    Accumulating gradients does not change it, nor does the number of devices by itself. It is counted in samples: a
    layer in a detector's head sees many rows a sample, and a layer on rows ``(N, C)`` makes ghosts of two at least.
    Layers frozen by Lightning's ``BaseFinetuning`` but in train mode do normalize with the batch.

    Args:
        trainer: The Trainer.
        module: Its module.
        samples: Samples in the batch of this device; other ranks are taken to have as many. By default those of the
            batch that is trained on at the moment, and between batches the ``batch_size`` of the train dataloader, the
            first if there are several.
        layers: Glob patterns over qualified layer names; None for every BatchNorm layer.

    Returns:
        Qualified name -> NBS.

    Raises:
        ValueError: If there is no BatchNorm layer, a pattern matches nothing, or there is no batch of which the
            samples can be told.

    Example:
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from torch import nn
        >>> import lightning_bn as lbn
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
        >>> trainer, module = Trainer(logger=False, enable_checkpointing=False), Net()
        >>> handle = lbn.ghost_bn(module, size=32, layers="net.1")
        >>> lbn.normalization_batch_size(trainer, module, samples=256)
        {'net.1': 32, 'net.3': 256}
    """
    samples = _samples(trainer) if samples is None else samples
    trains = modes_of_training(trainer, module)
    found = find_bn(module, layers)
    return {name: _of_layer(layer, samples) if trains[layer] else torch.nan for name, layer in found.items()}


def _of_layer(layer: _BatchNorm, samples: float) -> float:
    size = samples
    if isinstance(layer, SyncBatchNorm):
        size *= get_world_size(cast("ProcessGroup | None", layer.process_group))
    for behavior in behaviors_of(layer):
        size = behavior.normalization_batch(size)
    return size


def _samples(trainer: Trainer) -> int:
    batch = current_train_batch(trainer)
    if batch is not None:
        return infer_batch_size(batch)
    combined = train_loaders(trainer)
    loaders = combined.flattened if combined is not None else []
    size = getattr(getattr(loaders[0], "batch_sampler", None), "batch_size", None) if loaders else None
    if size is None:
        raise ValueError(
            "The Trainer shows no batch, as before the first one of a fit, and no train dataloader that has a "
            "batch_size: pass samples=, the number of samples in the batch of one device."
        )
    return int(size)
