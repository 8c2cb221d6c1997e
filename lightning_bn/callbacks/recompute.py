"""The base of callbacks that replace running statistics before they are evaluated or saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.callbacks.freeze_bn import FreezeBNCallback
from lightning_bn.core.checks import check_int
from lightning_bn.core.population import PopulationStatistics
from lightning_bn.layers.find import Layers, as_patterns
from lightning_bn.trainer.averaging import averaged_weights, check_before_averaging, weights_version
from lightning_bn.trainer.compat import validation_was_skipped
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.failures import Failures, OnError, check_on_error
from lightning_bn.trainer.forecasting import TrainerForecast
from lightning_bn.trainer.logging import log_row
from lightning_bn.trainer.passes import PassResult


class RecomputeCallback(BatchNormCallback, ABC):
    """Replace running statistics before each validation of a fit, and at the end of an epoch that had none."""

    prefix: str
    """Prefix of the logged metrics."""
    on_error: OnError = "warn"

    def __init__(self, layers: Layers, every_n_validations: int) -> None:
        check_int("every_n_validations", every_n_validations, at_least=1)
        as_patterns(layers)
        self.layers = layers
        self.every_n_validations = every_n_validations
        self.result: PopulationStatistics | None = None
        self._forecast: TrainerForecast | None = None
        self._occasions = 0
        self._evaluated: tuple[int, ...] | None = None
        self._due, self._last_reason = False, ""
        self._failures = self._new_failures()

    def should_run(self, trainer: Trainer) -> bool:
        """Return whether to run before this validation; override to decide otherwise."""
        return self._occasions % self.every_n_validations == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._due, self._last_reason, self._failures = False, "", self._new_failures()
        if stage == "fit":  # a checkpoint is restored after this
            self._occasions, self._evaluated, self.result = 0, None, None
            if self._forecast:
                self._forecast.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_on_error(self.on_error)
        check_before_averaging(trainer, self)
        if self._forecast:
            self._forecast.start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the checkpoint of a resumed fit may have been saved before a validation that Lightning skips
        if validation_was_skipped(trainer) and self._is_due(trainer):
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(other, FreezeBNCallback):
                    other.freeze_again(trainer, pl_module)  # frozen layers keep their statistics
            self._run_on_averages(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._forecast:
            self._forecast.before_batch()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._forecast:
            self._forecast.after_batch()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._due = self._is_due(trainer)

    # not in on_validation_epoch_start, where other callbacks may swap weights
    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._run_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        validation_was_empty, self._due = self._due, False
        if validation_was_empty or (self._evaluated != weights_version(trainer) and self._is_due(trainer)):
            self._run_on_averages(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        state = {"occasions": self._occasions, "evaluated": self._evaluated, "passes": self._failures.state_dict()}
        return state | ({"forecast": self._forecast.state_dict()} if self._forecast else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._occasions, self._evaluated = state_dict["occasions"], state_dict["evaluated"]
        self._failures.load_state_dict(state_dict["passes"])
        if self._forecast:
            self._forecast.load_state_dict(state_dict.get("forecast", {}))

    @abstractmethod
    def _skip_reason(self, context: PassContext) -> str: ...  # empty if there is something to write

    @abstractmethod
    def _recompute(self, context: PassContext) -> PassResult | None: ...  # None if the EMA is good enough

    def _stages_overlap(self, other: BatchNormCallback) -> bool:
        return True  # both act in a fit

    def _new_failures(self) -> Failures:
        kept = "the running statistics are left as they were"
        return Failures(type(self).__name__, f"{self.prefix}/failed", kept, self.on_error)

    def _is_due(self, trainer: Trainer) -> bool:
        self._occasions, self._evaluated = self._occasions + 1, weights_version(trainer)
        return self.should_run(trainer)

    def _run_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        if self._due:
            self._due = False
            self._run(trainer, module)

    def _run_on_averages(self, trainer: Trainer, module: LightningModule) -> None:
        with averaged_weights(trainer, module):
            self._run(trainer, module)

    def _run(self, trainer: Trainer, module: LightningModule) -> None:
        result = self._failures.attempt(trainer, lambda: self._recompute_unless_skipped(trainer, module))
        if result is not None:
            self.result = result.statistics
            log_row(trainer, result.to_metrics(self.prefix))
            self._notify_population_pass(trainer, result)

    def _recompute_unless_skipped(self, trainer: Trainer, module: LightningModule) -> PassResult | None:
        context = PassContext.of(trainer, module, self.layers)
        reason = self._skip_reason(context) if context.layers else "all of its layers are frozen"
        if not reason:
            return self._recompute(context)
        # a switch to frozen statistics is no news
        is_planned = any(isinstance(c, FreezeBNCallback) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if reason != self._last_reason and (context.layers or not is_planned):
            rank_zero_warn(f"{type(self).__name__} leaves the running statistics as they are: {reason}.")
        self._last_reason = reason
        return None

    def _detach(self) -> None:
        if self._forecast:
            self._forecast.abandon()
