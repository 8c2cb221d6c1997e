"""PreciseBN: evaluation uses the population statistics of the weights it evaluates (paper, Sec. 3.2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_bn.callbacks.base import BatchNormCallback, as_stages
from lightning_bn.callbacks.freeze_bn import FreezeBNCallback
from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.core.population import PopulationStatistics
from lightning_bn.functional.measure import BatchSize
from lightning_bn.layers.find import Layers
from lightning_bn.trainer.averaging import averaged_weights, check_before_averaging, weights_version
from lightning_bn.trainer.failures import Failures, OnError, check_on_error
from lightning_bn.trainer.forecasting import TrainerForecast
from lightning_bn.trainer.forward import Forward
from lightning_bn.trainer.logging import log_row
from lightning_bn.trainer.pass_config import REPLAY_BYTES, PassConfig, check_no_pass_arguments
from lightning_bn.trainer.passes import PassResult, PopulationPass
from lightning_bn.trainer.resume import validation_was_skipped


class PreciseBNCallback(BatchNormCallback):
    """Recompute population statistics before each validation, instead of using the EMA (Sec. 3.2).

    Runs right before the first validation batch of a fit (after every hook that swaps weights: weight averaging,
    schedule-free optimizers), and at an epoch's end where no validation followed the last update, before checkpoints
    are written. So ``best`` and ``last`` checkpoints, loaded into the plain model, give the metric that was logged.
    Never in the sanity check. Weights, data order, random numbers and the module's metrics are bit for bit those of
    a run without it.

    When it helps: validation is noisy or spikes, because the EMA is stale: large batches, large learning rates, early
    epochs (ImageNet at batch 8192, epoch 30: 52.8 % error with EMA, 39.4 with PreciseBN; Table 1). When it does not:
    at the end of a converged training with i.i.d. batches of decent size (24.0 against 23.7).

    Statistics of much fewer than 100 samples at a time are wrong in depth, whatever their number (28.8 % at 2 against
    23.5 at 100; Table 2). So smaller batches wait for each other at every layer, which normalizes 100 samples or more
    together (`precise_bn` says how); ``normalization_batch_size`` changes that.

    Cost: one forward without gradients over ``num_samples`` samples; its own share of that is in benchmarks/RESULTS.md.
    Batches that wait take memory: what one keeps alive at the widest layer, times their number.

    Step-interval checkpoints (``every_n_train_steps``) are written outside validation and hold the EMA.

    Args:
        num_samples: Samples of all ranks together, in whole batches; fewer if the train dataloader has fewer. 1000 lies
            within 0.05 points of 10000 even far from convergence (Table 1), for a tenth of the cost.
        normalization_batch_size: Samples of all ranks to normalize together, B of Table 2: whole batches, as few as hold so many. 1
            takes the batches as they come; ``"population"`` is exact. By default 100, or, with a warning, what fits
            into half of the memory that is free; and, with a warning, 1 if the model's batches cannot wait for each
            other.
        tolerance: Stop before ``num_samples``, once the standard errors of every layer's means (in sigma) and variances
            (relative) are below it. By default 0.02, at which validation errors could not be told from those after
            10,000 samples: that took 9 to 14 % of these (docs/recipes.md). Smaller ones come to ``num_samples``.
        memory_limit: Bytes that waiting batches may take on each rank; what is beyond goes to the host's memory or to
            disk.
        every_n_validations: Run at every n-th occasion only.
        source: ``"train_dataloader"``: a fresh iterator over it. ``"replay"``: the last training batches, kept in main
            memory; for loaders that cannot be read twice. Or a function from the Trainer to a loader.
            ``"training"``: no pass at all, but statistics forecast from the training steps (see the docs page); the
            options of a pass (all but ``every_n_validations`` and ``layers``) are then refused.
        forward: ``"training_step"``, muted; ``"forward"``, the module called on the batch (its first element if it
            is a tuple or list, or with it as keywords if it is a mapping), everything but BatchNorm in eval mode; or
            a function of module and batch. Manual optimization needs one of the latter two.
        stages: Run before ``trainer.validate``, ``"test"`` or ``"predict"`` as well, outside of a fit. Training data
            then come from the (data) module's ``train_dataloader`` or from the ``source`` function.
        layers: Glob patterns over qualified layer names, such as ``"backbone.*"``; None for every layer that is not
            frozen.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors and the length of lists of images.
        shard: Whether ranks share the batches of a ``source`` function out, or each shows all of them.
        replay_bytes: What replayed batches may take in main memory on each rank.
        when_needed: Skip a pass of a fit where a forecast from the training steps says that the EMA is good enough; it
            then stays as it is.
        needed_above: By how much the EMA may be off for that in any layer, as forecast: sigma for means, log ratio for
            variances.
        on_error: What happens if a pass fails once one of the fit has succeeded: ``"warn"`` leaves the statistics as
            they were, says why, counts it as ``precise_bn/failed`` and goes on; ``"raise"`` ends the fit.

    Attributes:
        result: What the last pass measured, or None.

    Raises:
        ValueError: At fit start, naming the way out: no layer to estimate, a module or loader that cannot be shown
            batches neutrally, another PreciseBNCallback on the same layers, weight averaging listed after this
            callback. With a forecast also: weight averaging, a schedule-free optimizer, no layer to forecast.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import PreciseBNCallback
        >>> trainer = Trainer(callbacks=[PreciseBNCallback(num_samples=1000)], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.PreciseBNCallback
              init_args: {num_samples: 1000, layers: "backbone.*"}
        ```
    """

    kind = "population"

    def __init__(
        self,
        num_samples: int = 1000,
        normalization_batch_size: BatchSize = None,
        tolerance: float | None = None,
        memory_limit: int | None = None,
        every_n_validations: int = 1,
        source: Literal["train_dataloader", "replay", "training"]
        | Callable[[Trainer], Iterable[Any]] = "train_dataloader",
        forward: Forward = "training_step",
        stages: Sequence[Literal["validate", "test", "predict"]] = (),
        layers: Layers = None,
        batch_size_fn: BatchSizeFn | None = None,
        shard: bool = True,
        replay_bytes: int = REPLAY_BYTES,
        when_needed: bool = False,
        needed_above: float = 0.05,
        on_error: OnError = "warn",
    ) -> None:
        check_int("every_n_validations", every_n_validations, at_least=1)
        check_bool("when_needed", when_needed)
        check_on_error(on_error)
        if not isinstance(needed_above, (int, float)) or not needed_above >= 0:
            raise ValueError(f"needed_above must be a number of sigma, 0 or more, but is {needed_above!r}.")
        self.layers = layers
        self.every_n_validations = every_n_validations
        self.stages = as_stages("stages", stages)
        self.result: PopulationStatistics | None = None
        self.when_needed = when_needed
        self.needed_above = needed_above
        self.on_error: OnError = on_error
        if source == "training":
            options: dict[str, Any] = {
                "num_samples": num_samples,
                "normalization_batch_size": normalization_batch_size,
                "tolerance": tolerance,
            }
            options |= {
                "memory_limit": memory_limit,
                "forward": forward,
                "stages": self.stages,
                "batch_size_fn": batch_size_fn,
            }
            options |= {"shard": shard, "replay_bytes": replay_bytes, "when_needed": when_needed}
            check_no_pass_arguments(options, inspect.signature(PreciseBNCallback).parameters)
        self._forecasting = TrainerForecast(layers) if source == "training" or when_needed else None
        self._pass: PopulationPass | None = None
        if source != "training":
            config = PassConfig(
                num_samples,
                source,
                forward,
                layers,
                batch_size_fn,
                shard,
                replay_bytes,
                normalization_batch_size,
                tolerance,
                memory_limit,
            )
            self._pass = PopulationPass(config, type(self).__name__)
        self._occasions = 0
        self._evaluated: tuple[int, ...] | None = None
        self._begin()

    def should_run(self, trainer: Trainer) -> bool:
        """Whether to run at this occasion; override to decide otherwise."""
        return self._occasions % self.every_n_validations == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state, and what was learned of another model; a checkpoint is restored after this."""
        self._begin()
        if self._pass:
            self._pass.begin(fit=stage == "fit")
        if stage == "fit":
            self._occasions, self._evaluated, self.result = 0, None, None
            if self._forecasting:
                self._forecasting.begin()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the configuration before training starts."""
        super().on_fit_start(trainer, pl_module)
        check_before_averaging(trainer, self)
        for each in (self._pass, self._forecasting):
            if each:
                each.check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a loader that cannot be read a second time, as it exists now; make up for what a resume skips."""
        if self._pass:
            self._pass.check_loader(trainer)
        if validation_was_skipped(trainer) and self._occasion(trainer):
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(other, FreezeBNCallback):
                    other.freeze_again(trainer, pl_module)  # what is frozen keeps its statistics
            self._run_on_averages(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See whether the first batch can be shown, keep those to be replayed; watch the step for a forecast."""
        if self._pass:
            self._pass.look_at(pl_module, batch)
        if self._forecasting:
            self._forecasting.before_batch()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Watch the step."""
        if self._forecasting:
            self._forecasting.after_batch()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that an occasion has come; the pass waits for the other hooks of this moment, which may swap weights."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._due = self._occasion(trainer)
        else:
            self._due = "validate" in self.stages

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether ``trainer.test`` asks for a pass."""
        self._due = "test" in self.stages

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether ``trainer.predict`` asks for a pass."""
        self._due = "predict" in self.stages

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Run, before the first batch is evaluated."""
        self._run_if_due(trainer, pl_module)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The same before ``trainer.test``."""
        self._run_if_due(trainer, pl_module)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The same before ``trainer.predict``."""
        self._run_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run, before checkpoints are written, if no validation has seen the weights as they are now."""
        self._abandon()
        without_batches, self._due = self._due, False  # a validation that had none
        if without_batches or (self._evaluated != weights_version(trainer) and self._occasion(trainer)):
            self._run_on_averages(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no layer watched."""
        self._abandon()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no layer watched."""
        self._abandon()

    def state_dict(self) -> dict[str, Any]:
        """Occasions so far, the version of the weights at the last one, how passes ended, what a forecast has seen."""
        forecast = {"forecast": self._forecasting.state_dict()} if self._forecasting else {}
        passes = self._failures.state_dict()
        return {"occasions": self._occasions, "evaluated": self._evaluated, "passes": passes, **forecast}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the callback state."""
        self._occasions, self._evaluated = state_dict["occasions"], state_dict["evaluated"]
        if "passes" in state_dict:
            self._failures.load_state_dict(state_dict["passes"])
        if self._forecasting:
            self._forecasting.load_state_dict(state_dict.get("forecast", {}))

    def _occasion(self, trainer: Trainer) -> bool:
        self._occasions, self._evaluated = self._occasions + 1, weights_version(trainer)
        return self.should_run(trainer)

    def _begin(self) -> None:
        self._due, self._said = False, ""
        kept = "the running statistics are left as they were"
        self._failures = Failures(type(self).__name__, "precise_bn/failed", kept, self.on_error)

    def _run_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        if self._due:
            self._due = False
            if self._pass and trainer.state.fn != "fit":  # whose start has seen to it
                self._pass.check(trainer, module)
            self._run(trainer, module)

    def _run_on_averages(self, trainer: Trainer, module: LightningModule) -> None:
        with averaged_weights(trainer, module):
            self._run(trainer, module)

    def _run(self, trainer: Trainer, module: LightningModule) -> None:
        recomputed = self._failures.attempt(trainer, lambda: self._recompute(trainer, module))
        if recomputed is None:
            return
        self.result = recomputed.statistics
        if self.result.spilled:
            rank_zero_info(
                f"PreciseBN put {self.result.spilled:,} bytes of waiting batches elsewhere to stay within memory_limit."
            )
        log_row(trainer, recomputed.to_metrics("precise_bn"))
        self._notify_population_pass(trainer, recomputed)

    def _abandon(self) -> None:
        if self._forecasting:
            self._forecasting.abandon()

    def _recompute(self, trainer: Trainer, module: LightningModule) -> PassResult | None:
        recomputes = self._pass or self._forecasting
        assert recomputes is not None  # one of them was made
        reason = recomputes.skip_reason(trainer, module)
        if reason:
            if reason != self._said:
                rank_zero_warn(f"PreciseBNCallback leaves the running statistics as they are: {reason}.")
            self._said = reason
            return None
        if self.when_needed and trainer.state.fn == "fit" and not self._is_needed(trainer, module):
            return None
        return recomputes.run(trainer, module)

    def _is_needed(self, trainer: Trainer, module: LightningModule) -> bool:
        assert self._forecasting is not None  # when_needed has made it
        gap = self._forecasting.ema_gap(trainer, module)
        log_row(trainer, {"precise_bn/ema_gap": gap})
        return gap > self.needed_above
