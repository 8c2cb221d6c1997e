"""SyncBN in training: a normalization batch over several devices (paper, App. A.5 and A.6)."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from lightning_bn.callbacks.base import FitScopedCallback
from lightning_bn.core.checks import check_int
from lightning_bn.functional.sync import sync_bn
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import Layers, as_patterns


class SyncBNCallback(FitScopedCallback):
    """Normalize over the batches of several ranks as over one, for the length of a fit (App. A.5, A.6).

    The normalization batch size (NBS) becomes that of a device times ``ranks``; outputs, gradients and running
    statistics are those of one process with all these batches. Unlike ``Trainer(sync_batchnorm=True)`` it keeps the
    layers, subclasses with a forward of their own (timm's ``BatchNormAct2d``) among them, acts on those you choose,
    over as many ranks as you choose, and runs on the CPU. Evaluation, frozen layers and `PreciseBNCallback`'s passes
    do not wait for other ranks. See `sync_bn`, which this is.

    When it helps: devices that hold fewer than 16 samples (validation error 32.5 % at NBS 2, 26.4 at 4, 24.3 at 8, 23.5
    at 16; Fig. 5), and heads whose samples are correlated within a device (Mask R-CNN, one image a device: box AP 41.7
    against 30.7; Table 3). When it does not: from NBS 16 to 128 error stays between 23.2 and 23.5 %, and beyond it
    rises (23.7 at 1024): ``ranks`` keeps it where it should be. It does nothing for accumulated gradients.

    Cost: two exchanges of a few numbers a channel for each layer and step, at which all ranks wait for the slowest, and
    a break in the graph of ``torch.compile``.

    Every rank must come to every train-mode forward and backward of a synced layer, with an empty batch if it has none;
    else the others wait until torch.distributed gives up. DDP and Lightning's samplers see to it, unless a training
    step skips batches.

    Args:
        group_size: So many ranks share statistics: the first ``group_size``, the next, and so on; their number must be a multiple
            of it. None for all.
        layers: Glob patterns over qualified layer names; None for every BatchNorm layer but torch's own SyncBatchNorm,
            which need nobody.

    Raises:
        ValueError: At fit start, if ``ranks`` does not divide the number of ranks, or for a layer that is under
            `GhostBNCallback`.
        TypeError: At fit start, if ``ranks`` is given for torch's own SyncBatchNorm; at a layer's first forward, if its
            class computes without ``torch.nn.functional.batch_norm``.
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
              init_args: {ranks: 4, layers: ["roi_heads.*"]}
        ```
    """

    kind = "sync"

    def __init__(self, group_size: int | None = None, layers: Layers = None) -> None:
        super().__init__()
        if group_size is not None:
            check_int("ranks", group_size, at_least=1)
        as_patterns(layers)
        self.group_size = group_size
        self.layers = layers

    def _attach(self, module: LightningModule) -> Handle:
        return sync_bn(module, group_size=self.group_size, layers=self.layers)
