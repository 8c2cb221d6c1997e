"""PreciseBN: evaluation uses the population statistics of the weights it evaluates (paper, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_bn.callbacks.base import as_stages
from lightning_bn.callbacks.recompute import RecomputeCallback
from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.functional.measure import NormalizationBatchSize
from lightning_bn.layers.find import Layers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.forecasting import TrainerForecast
from lightning_bn.trainer.forward import Forward
from lightning_bn.trainer.logging import log_row
from lightning_bn.trainer.pass_config import DEFAULT_TOLERANCE, PassConfig, Source
from lightning_bn.trainer.passes import PassResult, PopulationPass


class PreciseBNCallback(RecomputeCallback):
    r"""Recompute population statistics before each validation, instead of using the EMA (Sec. 3.2).

    A pass runs training batches through the fixed model and merges the batch statistics as `precise_bn` does:
    $\mu_{pop} = E[\mu_B]$, $\sigma_{pop}^2 = E[\mu_B^2 + \sigma_B^2] - E[\mu_B]^2$. An epoch without validation gets
    its pass before checkpoints are written. Weights, data order, random numbers and metrics do not change.

    It helps if validation is noisy because the EMA is stale: large batches, large learning rates, early epochs.
    It does not help a converged model with i.i.d. batches of decent size (Table 1).
    Cost: one forward without gradients over ``num_samples`` samples.

    Args:
        num_samples: Samples of all ranks, in whole batches. 1000 samples are as good as 10,000 (Table 1).
        normalization_batch_size: Samples of all ranks that are normalized jointly, in whole batches. ``"auto"`` joins
            batches of fewer than 32 samples to 100, as far as half of the free memory allows. ``"loader"`` takes
            batches as they are. ``"population"`` takes all samples, which is exact.
        tolerance: Stop before ``num_samples`` once the standard errors of every layer's means (in sigma) and variances
            (relative) are below it. None never stops early, and neither does ``"population"``.
        memory_limit: Bytes that waiting batches may take on each rank; the rest moves to the host's memory or to disk.
        every_n_validations: Run before every n-th validation only.
        source: ``"train_dataloader"``: a fresh iterator over it. ``"replay"``, or ``Replay(max_bytes=...)``: the last
            training batches. ``FromLoader(fn)``: a loader that ``fn(trainer)`` returns.
        forward: ``"training_step"``, muted; ``"forward"``, the module called on the batch; or a function of module and
            batch. Manual optimization needs one of the latter two.
        stages: Also run before ``trainer.validate``, ``"test"`` or ``"predict"``.
        layers: Glob patterns over qualified layer names, such as ``"backbone.*"``; None for every layer that is not
            frozen.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors and the length of lists of
            images.
        skip_below: In a fit, skip the pass if a forecast finds the EMA off by at most this in every layer (sigma for
            means, log ratio for variances). None never skips.

    Attributes:
        result: The statistics of the last pass, or None.
        config: The arguments of the pass, as a `PassConfig`.
        on_error: ``"warn"``: if a later pass fails, warn, keep the running statistics, and log ``precise_bn/failed``.
            ``"raise"`` ends the fit. Set it on the callback.

    Raises:
        ValueError: At construction or fit start: no layer to estimate, a module or loader that a pass would disturb, a
            conflicting callback, or weight averaging listed after this callback.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import PreciseBNCallback
        >>> trainer = Trainer(callbacks=[PreciseBNCallback(num_samples=1000)], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI (other callbacks alike):

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.PreciseBNCallback
              init_args: {num_samples: 1000, layers: "backbone.*"}
        ```
    """

    kind = "population"
    prefix = "precise_bn"

    def __init__(
        self,
        num_samples: int = 1000,
        *,
        normalization_batch_size: NormalizationBatchSize = "auto",
        tolerance: float | None = DEFAULT_TOLERANCE,
        memory_limit: int | None = None,
        every_n_validations: int = 1,
        source: Source = "train_dataloader",
        forward: Forward = "training_step",
        stages: Sequence[Literal["validate", "test", "predict"]] = (),
        layers: Layers = None,
        batch_size_fn: BatchSizeFn | None = None,
        skip_below: float | None = None,
    ) -> None:
        super().__init__(layers, every_n_validations)
        if skip_below is not None and not (isinstance(skip_below, (int, float)) and skip_below >= 0):
            raise ValueError(f"skip_below must be a number of at least 0 or None but is {skip_below!r}.")
        owner = type(self).__name__
        self.config = PassConfig(
            num_samples, normalization_batch_size, tolerance, memory_limit, batch_size_fn, source, forward
        )
        self.stages = as_stages("stages", stages)
        self.skip_below = skip_below
        self._pass = PopulationPass(self.config, layers, owner)
        if skip_below is not None:
            self._forecast = TrainerForecast(layers, owner, "leave out skip_below=")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._pass.reset(keep_replay=stage != "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._pass.check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass.check_loader(trainer)  # exists from here on
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._pass.on_train_batch(pl_module, batch)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        if trainer.state.fn != "fit":
            self._due = "validate" in self.stages

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = "test" in self.stages

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = "predict" in self.stages

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._run_if_due(trainer, pl_module)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._run_if_due(trainer, pl_module)

    def _skip_reason(self, context: PassContext) -> str:
        return self._pass.skip_reason()

    def _recompute(self, context: PassContext) -> PassResult | None:
        trainer = context.trainer
        if trainer.state.fn != "fit":  # in a fit, on_fit_start has done it
            self._pass.check(trainer, context.module)
        elif self._forecast and self.skip_below is not None:
            gap = self._forecast.ema_gap(context)
            log_row(trainer, {"precise_bn/ema_gap": gap})
            if gap <= self.skip_below:
                return None
        result = self._pass.run(context)
        if result.statistics.spilled:
            rank_zero_info(
                f"PreciseBNCallback moved {result.statistics.spilled:,} bytes of waiting batches to the host's memory "
                "or to disk to stay within memory_limit."
            )
        return result
