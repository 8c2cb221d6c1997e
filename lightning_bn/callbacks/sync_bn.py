"""SyncBN in training: a normalization batch over several devices (paper, App. A.5 and A.6)."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from lightning_bn.callbacks.base import FitScopedCallback
from lightning_bn.core.checks import check_int
from lightning_bn.functional.sync import sync_bn
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import Layers, as_patterns


class SyncBNCallback(FitScopedCallback):
    """Normalize over the batches of several ranks as over one, during a fit (App. A.5, A.6). See `sync_bn`.

    Unlike ``Trainer(sync_batchnorm=True)`` it keeps the layers and the forward of subclasses, selects layers and ranks,
    and runs on the CPU. Evaluation, frozen layers and `PreciseBNCallback`'s passes do not synchronize.

    Every rank must run every train-mode forward and backward of a synced layer, with an empty batch if it has none.
    Otherwise training deadlocks until the process-group timeout.

    It helps for device batches below 16, and for heads whose samples are correlated within a device (Fig. 5, Table 3).
    It does not help with accumulated gradients, or from 16 samples per device on.
    Cost: two exchanges of a few numbers per channel, for each layer and step.

    Args:
        group_size: Number of consecutive ranks that share statistics; must divide the number of ranks. None for all.
        layers: Glob patterns over qualified layer names; None for every BatchNorm layer. torch's SyncBatchNorm layers
            are left unchanged.

    Raises:
        ValueError: At fit start, for a ``group_size`` that does not divide the ranks, or a conflicting callback.
        TypeError: For ``group_size`` with torch's SyncBatchNorm, or a layer class that does not call
            ``torch.nn.functional.batch_norm``.
        RuntimeError: At fit start, for a strategy that shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import SyncBNCallback
        >>> trainer = Trainer(callbacks=[SyncBNCallback()], logger=False, enable_checkpointing=False)
    """

    kind = "sync"

    def __init__(self, group_size: int | None = None, *, layers: Layers = None) -> None:
        super().__init__()
        if group_size is not None:
            check_int("group_size", group_size, at_least=1)
        as_patterns(layers)
        self.group_size = group_size
        self.layers = layers

    def _attach(self, module: LightningModule) -> Handle:
        return sync_bn(module, group_size=self.group_size, layers=self.layers)
