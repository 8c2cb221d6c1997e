"""Ghost BN in training: a normalization batch smaller than the batch of a device (paper, App. A.5)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.callbacks.during_fit import FitScopedCallback
from lightning_bn.core.batch_sizes import infer_batch_size
from lightning_bn.functional.ghost import ghost_bn, require_ghosts
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import Layers, as_patterns
from lightning_bn.layers.ghost import Grouping
from lightning_bn.functional.normalization_batch import normalization_batch_size


class GhostBNCallback(FitScopedCallback):
    """Normalize groups ("ghosts") of the training batch separately, for the length of a fit (App. A.5).

    The normalization batch size (NBS) becomes that of a group, whatever the batch of the device. Evaluation, frozen
    layers and `PreciseBNCallback`'s passes normalize as they do without; running statistics are updated once a step,
    with those of the whole batch. See `ghost_bn`, which this is.

    When it helps: as a regulariser where a device's batch holds more than about 128 samples (validation error 23.7 % at
    NBS 1024 and 512, 23.2 at 64, 23.4 at 32; Fig. 5 and 6); against information that leaks through batches put together
    by a pattern (Fig. 8: 51.1 % with population statistics where there should be about 23). When it does not: groups of
    8 and fewer cost accuracy (24.3 % at 8, 32.5 at 2), and a training that normalizes 16 to 128 samples together has
    nothing to gain.

    Cost: about 0.14 ms a layer for interleaved groups of one size in an NCHW input; the layers' time 1.1 to
    1.3 times as long on a CPU for ``"contiguous"`` ones, 2.4 to 2.6 for ragged batches and ``channels_last``
    (benchmarks/RESULTS.md).

    Args:
        size: Most samples in a group; 32 is the paper's usual NBS. Either this
        splits: or the number of groups in each device's batch.
        grouping: ``"interleaved"``, sample i belongs to group i mod their number, separates what lies side by side in
            an ordered batch; ``"contiguous"`` makes groups of runs of samples.
        layers: Glob patterns over qualified layer names; None for every BatchNorm layer.

    Raises:
        ValueError: At construction, if not exactly one of ``size`` and ``splits`` is given; at fit start, for a layer
            that is under `SyncBNCallback`.
        TypeError: At fit start, for a SyncBatchNorm; at a layer's first forward, if its class computes without
            ``torch.nn.functional.batch_norm``.
        RuntimeError: At fit start, for a strategy that shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import GhostBNCallback
        >>> trainer = Trainer(callbacks=[GhostBNCallback(size=32)], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.GhostBNCallback
              init_args: {size: 32, layers: "backbone.*"}
        ```
    """

    kind = "ghost"

    def __init__(
        self,
        size: int | None = None,
        splits: int | None = None,
        grouping: Grouping = "interleaved",
        layers: Layers = None,
    ) -> None:
        super().__init__()
        require_ghosts(size, splits, grouping)
        as_patterns(layers)
        self.size = size
        self.splits = splits
        self.grouping = grouping
        self.layers = layers
        self._looked = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        super().on_fit_start(trainer, pl_module)
        self._looked = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See, at the first batch, whether there is anything to divide."""
        if not self._looked:
            self._looked = True
            with suppress(ValueError):  # a batch that cannot be counted
                self._warn_of_nothing(pl_module, infer_batch_size(batch))

    def _give(self, module: LightningModule) -> Handle:
        return ghost_bn(module, size=self.size, splits=self.splits, grouping=self.grouping, layers=self.layers)

    def _warn_of_nothing(self, module: LightningModule, samples: int) -> None:
        sizes = normalization_batch_size(module, samples=samples, layers=self.layers).values()
        if any(size < samples for size in sizes):
            return
        divided = f"size={self.size}" if self.size else f"splits={self.splits}"
        reason = f"the batch of a device holds {samples} samples, which {divided} does not divide"
        if not any(size == samples for size in sizes):
            reason = "all of its layers are frozen, or in eval mode"
        rank_zero_warn(f"GhostBNCallback changes nothing: {reason}.")
