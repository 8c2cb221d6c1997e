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

    The normalization batch size (NBS) becomes the device's times ``group_size``. Outputs, gradients and running
    statistics are those of one process with all batches. Unlike ``Trainer(sync_batchnorm=True)`` it keeps the layers
    and the forward of subclasses (timm's ``BatchNormAct2d``), selects layers and ranks, and runs on the CPU.
    Evaluation, frozen layers and `PreciseBNCallback`'s passes do not synchronize.

    It helps for device batches below 16, and for heads whose samples are correlated within a device (Fig. 5, Table 3).
    It does nothing for accumulated gradients.

    Every rank must run every train-mode forward and backward of a synced layer, with an empty batch if it has none.
    Otherwise training deadlocks until the process-group timeout. DDP with Lightning's samplers ensures it, unless a
    training step skips batches.

    Args:
        group_size: Number of consecutive ranks that share statistics; must divide the number of ranks. None selects
            all.
        layers: Glob patterns over qualified layer names; None selects every BatchNorm layer. torch's SyncBatchNorm
            layers are left unchanged.

    Raises:
        ValueError: At fit start, if ``group_size`` does not divide the number of ranks, or for a layer of another
            callback that conflicts.
        TypeError: At fit start, if ``group_size`` is given for torch's SyncBatchNorm; at a layer's first forward, if
            its class does not call ``torch.nn.functional.batch_norm``.
        RuntimeError: At fit start, for a strategy that shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import SyncBNCallback
        >>> trainer = Trainer(callbacks=[SyncBNCallback()], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          devices: 8
          strategy: ddp
          callbacks:
            - class_path: lightning_bn.SyncBNCallback
              init_args: {group_size: 4, layers: ["roi_heads.*"]}
        ```
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
