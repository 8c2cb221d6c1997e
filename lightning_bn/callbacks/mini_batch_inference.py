"""Mini-batch inference: evaluation uses the statistics of the evaluated batch (paper, Sec. 4.2)."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.callbacks.base import BatchNormCallback, as_stages
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.ranks import sum_over_ranks
from lightning_bn.functional.mini_batch import MiniBatchHandle, mini_batch_inference
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.logging import log_row


class MiniBatchInferenceCallback(BatchNormCallback):
    """Normalize in evaluation with the statistics of the mini-batch, instead of the population's (Sec. 4.2).

    Running statistics are neither used nor changed, and training is not affected. An input with one value per channel
    uses the running statistics.

    It helps layers that get many rows of each image, such as R-CNN heads trained on few images (Table 3).
    It does not help classifiers: predictions depend on the other images of the batch. It warns of that.
    Cost: each input is read once more.

    Args:
        stages: Some of ``"validate"`` (also within a fit, but not in the sanity check), ``"test"`` and ``"predict"``.
        layers: Glob patterns over qualified layer names, such as ``"roi_heads.*"``; None for every layer that is not
            frozen.
        batch_size_fn: Number of samples in a batch; None infers it.

    Attributes:
        fallbacks: Calls of layers in the last evaluation, on all ranks, that had one value per channel.

    Raises:
        ValueError: At the start, without a layer, or for a conflicting callback.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import MiniBatchInferenceCallback
        >>> callback = MiniBatchInferenceCallback(layers="roi_heads.*")
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    kind = "mini-batch"

    def __init__(
        self,
        stages: Sequence[Literal["validate", "test", "predict"]] = ("validate", "test", "predict"),
        *,
        layers: Layers = None,
        batch_size_fn: BatchSizeFn | None = None,
    ) -> None:
        as_patterns(layers)
        self.stages = as_stages("stages", stages)
        self.layers = layers
        self.fallbacks = 0
        self._batch_size_fn = as_batch_size_fn(batch_size_fn)
        self._handle: MiniBatchHandle | None = None
        self._is_first_batch = True
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._warned = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        storing_layers(pl_module, self.layers)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = "validate" if trainer.state.fn == "fit" else trainer.state.fn
        if stage not in self.stages or trainer.sanity_checking:
            return
        self._check_overlap(trainer, pl_module)
        # In evaluation every layer is in eval mode. The context knows which ones were so in training, as frozen layers.
        chosen = PassContext.of(trainer, pl_module, self.layers).layers
        if not chosen:
            self._warn_once("MiniBatchInferenceCallback does nothing: all of its layers are frozen, or in eval mode.")
            return
        self.fallbacks, self._is_first_batch = 0, True
        self._handle = mini_batch_inference(pl_module, layers=[glob.escape(name) for name in chosen])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._handle is None or not self._is_first_batch:
            return
        self._is_first_batch = False
        samples, rows = None, self._handle.min_rows
        with suppress(ValueError):  # unknown size
            samples = self._batch_size_fn(batch)
        if rows is not None and samples != 1 and (samples is None or rows <= samples):
            self._warn_once(
                "MiniBatchInferenceCallback: predictions of one batch depend on each other, because they share its "
                "statistics. They change with the size and the order of batches. Layers that get many rows of each "
                "image, as in R-CNN heads, are hardly affected: choose those by layers=."
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._handle is None:
            return
        self.fallbacks, *_ = sum_over_ranks([self._handle.fallbacks], pl_module.device)
        self._undo()
        if self.fallbacks:
            log_row(trainer, {"mini_batch_inference/fallbacks": float(self.fallbacks)})
            self._warn_once(
                f"MiniBatchInferenceCallback: {self.fallbacks} calls of layers had one value per channel, which has no "
                "variance, and were normalized with the running statistics. Evaluate in larger batches.",
                key="fallbacks",
            )

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_end = on_predict_batch_end = on_test_batch_end
    on_validation_end = on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}

    def _warn_once(self, message: str, key: str = "") -> None:
        if (key or message) not in self._warned:
            self._warned.add(key or message)
            rank_zero_warn(message)

    def _undo(self) -> None:
        if self._handle is not None:
            self._handle.undo()
        self._handle = None
