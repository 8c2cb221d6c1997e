"""Mini-batch inference: evaluation uses the statistics of the batch that is evaluated (paper, Sec. 4.2)."""

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
from lightning_bn.functional.precise import estimable_layers
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.layers.rows import CountsRows
from lightning_bn.trainer.logging import log_row
from lightning_bn.trainer.modes import modes_of_training


class MiniBatchInferenceCallback(BatchNormCallback):
    """Normalize with the statistics of the evaluated mini-batch, instead of the population's (Sec. 4.2).

    Layers do in evaluation what they do in training. Running statistics are neither used nor changed, and training is
    bit for bit what it was. Never in the sanity check.

    When it helps: layers that get many rows of each image, as in an R-CNN head, trained at small normalization
    batches: box AP 30.7 -> 41.5 at one image per GPU, 40.1 -> 41.3 at two (Table 3). When it does not: for a
    classifier the prediction for an image then depends on the others in its batch, so that it changes with the size
    and order of batches, and it is more accurate only at normalization batches of 4 and fewer (validation error 32.5
    -> 26.0 % at 2, but 23.4 -> 24.5 at 32; Fig. 5 and 6).

    After the first evaluated batch it warns of that dependence, unless the batch had a single sample or every chosen
    layer was given more rows than there were samples, as a head that runs on regions is. Even then, images evaluated
    in one batch share their statistics; with one image a batch they share nothing.

    A batch with one value per channel has no variance, and takes the running statistics instead: logged as
    ``mini_batch_inference/fallbacks``, the number of such calls of layers in the evaluation, and warned of once.

    Cost: that of a training forward, which reads each input once more.

    Args:
        stages: When, of ``"validate"`` (in a fit, too), ``"test"`` and ``"predict"``.
        layers: Glob patterns over qualified layer names, such as ``"roi_heads.*"``; None for every layer that is not
            frozen.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors and the length of lists of images.

    Attributes:
        fallbacks: Calls of layers in the last evaluation, on all ranks, that had one value per channel.

    Raises:
        ValueError: At the start: no layer, or another MiniBatchInferenceCallback on the same one.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import MiniBatchInferenceCallback
        >>> callback = MiniBatchInferenceCallback(layers="roi_heads.*")
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.MiniBatchInferenceCallback
              init_args: {stages: [validate, test], layers: "roi_heads.*"}
        ```
    """

    kind = "mini-batch"

    def __init__(
        self,
        stages: Sequence[Literal["validate", "test", "predict"]] = ("validate", "test", "predict"),
        layers: Layers = None,
        batch_size_fn: BatchSizeFn | None = None,
    ) -> None:
        as_patterns(layers)
        self.stages = as_stages("stages", stages)
        self.layers = layers
        self.fallbacks = 0
        self._count = as_batch_size_fn(batch_size_fn)
        self._handle: MiniBatchHandle | None = None
        self._rows: tuple[CountsRows, Handle] | None = None
        self._said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the one-time warnings."""
        self._said = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the configuration before training starts."""
        super().on_fit_start(trainer, pl_module)
        storing_layers(pl_module, self.layers)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, unless it is the sanity check."""
        stage = "validate" if trainer.state.fn == "fit" else trainer.state.fn
        if stage in self.stages and not trainer.sanity_checking:
            self._begin(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """See, after the first batch, whether predictions depend on each other."""
        self._see_rows(batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the population, with a word on the batches that were too small."""
        if self._handle is not None:
            self.fallbacks, *_ = sum_over_ranks([self._handle.fallbacks], pl_module.device)
            self._undo()
            self._report(trainer)

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_end = on_predict_batch_end = on_test_batch_end
    on_validation_end = on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Back to the population."""
        self._undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The same, should another callback have raised in its own."""
        self._undo()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hold on layers."""
        return {**vars(self), "_handle": None, "_rows": None}

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._check_overlap(trainer, module)
        # in evaluation a layer that is frozen by eval() cannot be told from the others, but here its mode is known
        chosen = estimable_layers(module, self.layers, modes_of_training(trainer, module).__getitem__)
        if not chosen:
            self._say("MiniBatchInferenceCallback does nothing: all of its layers are frozen, or in eval mode.")
            return
        self.fallbacks = 0
        self._handle = mini_batch_inference(module, layers=[glob.escape(name) for name in chosen])
        rows = CountsRows()
        self._rows = rows, Handle(chosen.values(), rows)

    def _see_rows(self, batch: Any) -> None:
        if self._rows is None:
            return
        (rows, handle), self._rows = self._rows, None
        handle.undo()
        samples = None
        with suppress(ValueError):  # a batch that cannot be counted
            samples = self._count(batch)
        if rows.fewest is not None and samples != 1 and (samples is None or rows.fewest <= samples):
            self._say(
                "MiniBatchInferenceCallback: predictions of one batch are not independent of each other, because they "
                "share its statistics. They change with the size and the order of batches. Only layers that are given "
                "many rows of each image, as in R-CNN heads, hardly mind: choose those by layers=."
            )

    def _report(self, trainer: Trainer) -> None:
        if self.fallbacks:
            log_row(trainer, {"mini_batch_inference/fallbacks": float(self.fallbacks)})
            self._say(
                f"MiniBatchInferenceCallback: {self.fallbacks} calls of layers had one value per channel, which has no "
                "variance, and were normalized with the running statistics. Evaluate in larger batches.",
                key="fallbacks",
            )

    def _say(self, message: str, key: str = "") -> None:
        if (key or message) not in self._said:
            self._said.add(key or message)
            rank_zero_warn(message)

    def _undo(self) -> None:
        for handle in (self._rows[1] if self._rows else None, self._handle):
            if handle is not None:
                handle.undo()
        self._handle = self._rows = None
