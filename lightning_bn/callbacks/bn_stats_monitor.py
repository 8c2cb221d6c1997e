"""BNStatsMonitor: log and draw the gap between EMA and batch statistics of every BatchNorm layer (paper, Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.callbacks.monitor_output import (
    first_nonfinite,
    layer_keys,
    log_figures,
    log_layer_names,
    log_overview,
    send_alert,
    warn_of_nonfinite,
    worst_lag,
)
from lightning_bn.callbacks.observing import ObservingCallback
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_int
from lightning_bn.functional.normalization_batch import normalization_batch_size
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.tracking.drift import QUANTITIES
from lightning_bn.tracking.record import DriftRecord, check_channels
from lightning_bn.trainer.compat import log_step, logs_at_this_batch
from lightning_bn.trainer.logging import log_row, safe_keys
from lightning_bn.trainer.passes import PassResult

_FIRST_FIGURE_AT_ROW = 32
"""Row of the first figures; the next ones follow whenever the number of rows has doubled."""


class BNStatsMonitor(ObservingCallback):
    """Log and draw the gap between EMA and batch statistics of every BatchNorm layer (Sec. 3.1).

    The gap is the root mean square over channels of ``(batch mean - EMA mean) / EMA sigma``; for variances, of the log
    ratio. Over a window, ``gap^2 = lag^2 + noise^2``: lag means a stale EMA, noise a small normalization batch.
    Training does not change. Errors within a fit become warnings.

    It helps to find the layers in which `PreciseBNCallback` or larger normalization batches would matter.
    It does not help to find a shift of evaluation data. A large gap does no harm before evaluation.
    Cost: under 1 % of a training step at the defaults. With several ranks it observes rank 0.

    Args:
        every_n_batches: Measure every n-th training batch.
        window: Minimum number of measured batches per row. A row is logged at the next step at which `self.log` logs.
        quantities: Values to log for each layer, of "mean_gap", "var_gap", "lag", "noise", "var_lag", "var_noise",
            "dead" (fraction of channels without variance) and "nonfinite" (fraction of channels).
        log_layers: Patterns of layers that get keys; None for all if there are at most 64, else none.
        trace_channels: Layer name -> channel to draw; None for channel 0 of the first, the middle and the last layer.
        alert_threshold: Warn, and alert in W&B, when the worst lag rises above this many sigma, and again only after it
            fell below half of it; None for never.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors or the length of a list.
        layers: Glob patterns over qualified layer names; None for every layer that stores statistics.

    Raises:
        ValueError: At fit start, if there is no logger, no layer, or no such channel.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> from lightning_bn import BNStatsMonitor
        >>> trainer = Trainer(callbacks=[BNStatsMonitor()], logger=CSVLogger("logs"), enable_checkpointing=False)
    """

    kind = "stats monitor"

    def __init__(
        self,
        every_n_batches: int = 5,
        *,
        window: int = 10,
        quantities: Sequence[str] = ("mean_gap", "var_gap"),
        log_layers: Layers = None,
        trace_channels: dict[str, int] | None = None,
        alert_threshold: float | None = 0.5,
        batch_size_fn: BatchSizeFn | None = None,
        layers: Layers = None,
    ) -> None:
        check_int("every_n_batches", every_n_batches, at_least=1)
        check_int("window", window, at_least=1)
        if not isinstance(quantities, (list, tuple)) or any(q not in QUANTITIES for q in quantities):
            raise ValueError(f"quantities must be a list of some of {', '.join(QUANTITIES)} but is {quantities!r}.")
        is_number = isinstance(alert_threshold, (int, float)) and not isinstance(alert_threshold, bool)
        if alert_threshold is not None and not (is_number and alert_threshold > 0):
            raise ValueError(f"alert_threshold must be a positive number of sigma or None but is {alert_threshold!r}.")
        check_channels(trace_channels)
        if log_layers is not None:
            as_patterns(log_layers, "log_layers")
        as_patterns(layers)
        self.every_n_batches, self.window, self.quantities = every_n_batches, window, tuple(quantities)
        self.log_layers, self.trace_channels, self.layers = log_layers, trace_channels, layers
        self.alert_threshold = alert_threshold
        self._count = as_batch_size_fn(batch_size_fn)
        self._record: DriftRecord | None = None
        self._restored: dict[str, Any] = {}
        self._batches, self._may_alert = 0, True
        self._samples: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._record, self._restored, self._samples = None, {}, None
            self._move_behind_statistics_callbacks(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not trainer.loggers:
            raise ValueError(
                "BNStatsMonitor has no logger to log to (Trainer(logger=False)). Pass one to the Trainer, for instance "
                "lightning.pytorch.loggers.CSVLogger('logs')."
            )
        layers, prefix = storing_layers(pl_module, self.layers), self._prefix(trainer)
        keys = layer_keys(layers, self.log_layers)
        self._record = DriftRecord(layers, keys, self.quantities, self.trace_channels, prefix)
        self._batches, self._may_alert = self._restored.get("batches", 0), self._restored.get("may_alert", True)
        if self._restored:
            try:
                self._record.load_state_dict(self._restored["record"])
            except ValueError as error:
                rank_zero_warn(f"BNStatsMonitor begins a new record: {error}")
        with self._errors_as_warnings("could not log the names of layers"):
            log_layer_names(trainer, self._record)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches += 1
        self._abandon()  # a batch that another hook has skipped
        # on rank 0 only: DDP broadcasts its running statistics to all ranks
        if self._record and trainer.is_global_zero and self._batches % self.every_n_batches == 0:
            with self._errors_as_warnings("cannot count the samples of a batch"):
                self._samples = self._count(batch)
            with self._errors_as_warnings("cannot measure a batch"):
                self._record.observer.before_batch()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._record:
            with self._errors_as_warnings("cannot measure a batch"):
                self._record.observer.after_batch(log_step(trainer))
            if self._record.observer.batches >= self.window and logs_at_this_batch(trainer):
                with self._errors_as_warnings("could not log"):
                    self._log(trainer, self._record)
                rows = self._record.history.rows_seen
                if rows >= _FIRST_FIGURE_AT_ROW and rows.bit_count() == 1:
                    with self._errors_as_warnings("could not log a figure or table"):
                        log_figures(trainer, self._record)

    def on_population_pass(self, trainer: Trainer, recomputed: PassResult) -> None:
        self._abandon()
        if self._record:
            with self._errors_as_warnings("cannot record a pass"):
                self._record.note_pass(log_step(trainer), recomputed.statistics, recomputed.moved)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._abandon()  # the last batch, if another hook has skipped it

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._record and trainer.is_global_zero:
            self._conclude(trainer, self._record)
            if self._record.last is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_warn(
                    f"BNStatsMonitor logged nothing: of {self._batches} batches it measures one in "
                    f"{self.every_n_batches}, and a row takes two. Lower every_n_batches."
                )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._abandon()
        if self._record and trainer.is_global_zero and trainer.state.fn == "fit":
            self._conclude(trainer, self._record)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._abandon()

    def state_dict(self) -> dict[str, Any]:
        if self._record is None:
            return self._restored
        return {"record": self._record.state_dict(), "batches": self._batches, "may_alert": self._may_alert}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:  # a copy has no reference to layers
        return {**vars(self), "_record": None, "_restored": self.state_dict()}

    def _log(self, trainer: Trainer, record: DriftRecord) -> None:
        step, module = log_step(trainer), trainer.lightning_module
        if self._samples is not None:
            record.nbs = normalization_batch_size(module, samples=self._samples, layers=self.layers)
        row = record.take_row(step)
        lag, worst = worst_lag(record)
        threshold = self.alert_threshold or float("inf")
        alerts = self._may_alert and lag > threshold
        self._may_alert = not alerts and (self._may_alert or lag < threshold / 2)
        if alerts:
            with self._errors_as_warnings("could not send its alert"):
                send_alert(trainer, record, step, self._has_callback(trainer, "PreciseBNCallback", worst))
        first = first_nonfinite(record)
        if first and not record.nonfinite_warned:
            record.nonfinite_warned = True
            warn_of_nonfinite(record, step, self._has_callback(trainer, "PreciseBNCallback", first))
        log_row(trainer, row)

    def _conclude(self, trainer: Trainer, record: DriftRecord) -> None:
        if record.observer.batches > 1:
            with self._errors_as_warnings("could not log"):
                self._log(trainer, record)
        if record.last is not None:
            with self._errors_as_warnings("could not log a figure or table"):
                log_figures(trainer, record)
                log_overview(trainer, record)

    def _abandon(self) -> None:
        if self._record:
            self._record.observer.abandon()

    def _prefix(self, trainer: Trainer) -> str:
        monitors = [c for c in trainer.callbacks if isinstance(c, BNStatsMonitor)]  # type: ignore[attr-defined]
        if len(monitors) < 2:  # none, if another callback calls this one's hooks
            return "bn"
        return "bn_" + list(safe_keys("_".join(as_patterns(m.layers)) for m in monitors).values())[monitors.index(self)]
