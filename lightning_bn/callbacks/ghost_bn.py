"""Ghost BN in training: normalize groups of a device's batch separately (paper, App. A.5)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.callbacks.base import FitScopedCallback
from lightning_bn.core.batch_sizes import infer_batch_size
from lightning_bn.functional.ghost import Grouping, check_grouping, ghost_bn
from lightning_bn.functional.normalization_batch import normalization_batch_size
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import Layers, as_patterns


class GhostBNCallback(FitScopedCallback):
    """Normalize groups ("ghosts") of the training batch separately, during a fit (App. A.5). See `ghost_bn`.

    The normalization batch size becomes that of a group. Evaluation, frozen layers and `PreciseBNCallback`'s passes do
    not change. Running statistics are updated once per step, from the whole batch.

    It helps as a regularizer for more than about 128 samples on a device, and separates samples that leak information.
    It does not help with a batch of 16 to 128 samples; groups of 8 or fewer cost accuracy (Fig. 5).
    Cost: small for interleaved groups of equal size, which are a view; others copy the batch (docs page).

    Args:
        size: Maximum number of samples in a group; the paper uses 32. Give either this or ``splits``.
        splits: Number of groups in each device's batch.
        grouping: ``"interleaved"``: sample i belongs to group i modulo the number of groups, which separates neighbors
            in an ordered batch. ``"contiguous"``: groups are runs of samples.
        layers: Glob patterns over qualified layer names; None for every BatchNorm layer.

    Raises:
        ValueError: Without exactly one of ``size`` and ``splits``; at fit start, for a conflicting callback.
        TypeError: For a SyncBatchNorm, or a layer class that does not call ``torch.nn.functional.batch_norm``.
        RuntimeError: At fit start, for a strategy that shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import GhostBNCallback
        >>> trainer = Trainer(callbacks=[GhostBNCallback(size=32)], logger=False, enable_checkpointing=False)
    """

    kind = "ghost"

    def __init__(
        self,
        size: int | None = None,
        *,
        splits: int | None = None,
        grouping: Grouping = "interleaved",
        layers: Layers = None,
    ) -> None:
        super().__init__()
        check_grouping(size, splits, grouping)
        as_patterns(layers)
        self.size = size
        self.splits = splits
        self.grouping = grouping
        self.layers = layers
        self._checked_first_batch = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._checked_first_batch = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._checked_first_batch:
            self._checked_first_batch = True
            with suppress(ValueError):  # the batch size cannot be inferred
                self._warn_without_effect(pl_module, infer_batch_size(batch))

    def _attach(self, module: LightningModule) -> Handle:
        return ghost_bn(module, size=self.size, splits=self.splits, grouping=self.grouping, layers=self.layers)

    def _warn_without_effect(self, module: LightningModule, samples: int) -> None:
        sizes = normalization_batch_size(module, samples=samples, layers=self.layers).values()
        if any(size < samples for size in sizes):
            return
        reason = "all of its layers are frozen, or in eval mode"
        if any(size == samples for size in sizes):
            divisor = f"size={self.size}" if self.size else f"splits={self.splits}"
            reason = f"with {divisor}, the {samples} samples of a device's batch are one group"
        rank_zero_warn(f"GhostBNCallback changes nothing: {reason}.")
