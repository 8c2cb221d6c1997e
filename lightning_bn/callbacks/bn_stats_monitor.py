"""BNStatsMonitor: how far the EMA lies from the batches it should summarize, layer by layer (paper, Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn import plots
from lightning_bn.callbacks.observing import ObservingCallback
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_int
from lightning_bn.functional.normalization_batch import normalization_batch_size
from lightning_bn.layers.find import Layers, as_patterns, match_names, storing_layers
from lightning_bn.tracking.alarm import Alarm
from lightning_bn.tracking.drift import AGGREGATES, QUANTITIES
from lightning_bn.tracking.record import COLUMNS, DriftRecord, check_channels
from lightning_bn.trainer.compat import log_step, logs_at_this_batch
from lightning_bn.trainer.logging import log_row, safe_keys
from lightning_bn.trainer.passes import PassResult

_MAX_KEYED = 64
"""Layers that get keys of their own by default: W&B advises less than 10,000 metrics a project."""

_FIRST_FIGURE_AT_ROW = 32
"""Pictures are drawn after so many rows, and whenever they have doubled: each shows the run from its start, and a
million rows make less than the 50 images that a run may have."""

_NO_PICTURE = "could not log a picture or table"


class BNStatsMonitor(ObservingCallback):
    """Log the gap between EMA and batch statistics of every BatchNorm layer, and draw it (Sec. 3.1).

    The gap of a layer is the root mean square over channels of ``(batch mean - EMA mean) / EMA sigma``, measured
    against the EMA as it was *before* the step moved it; that of variances is the log ratio's. Over a window it
    splits, ``gap^2 = lag^2 + noise^2``: *lag* says that the EMA is stale (large steps; `PreciseBNCallback` mends the
    evaluation), *noise* that the normalization batch is small (SyncBN, FreezeBN; noise 0.1 is that of 100 independent
    values). For frozen layers it is the drift of the data from the frozen statistics.

    Logged: ten figures for all layers (``bn_agg/...``), ``bn_mean_gap/<layer>`` and ``bn_var_gap/<layer>``; after 32
    rows, 64, 128 and so on, and at the end, pictures; at the end, a table. The module, its random numbers and its
    metrics are bit for bit those of a run without it. Whatever it meets in a fit is said once, and ends no training.

    When it does not help: it reads training batches, so it cannot see that evaluation data differ; a small gap does
    not mean that the batches suit the model, and a large one does no harm before evaluation.

    Cost: under 1 % of a training step at the defaults, and some 1.4 s each time pictures are drawn
    (benchmarks/RESULTS.md); memory for some numbers a channel. The batch statistics are recovered from the running
    ones. Where that is inaccurate (16-bit statistics, momentum 0, a mean of thousands of sigma, frozen layers, classes
    that move their statistics otherwise than torch) inputs are read, and the layer is marked; not inside a compiled
    region. A layer that normalizes without a ``batch_norm`` call, and otherwise than torch, is marked and left out.
    With several ranks the figures are those of rank 0, whose buffers all ranks use.

    Args:
        every_n_batches: Measure every n-th training batch.
        window: Measured batches of a row, at least; it is logged at the next step at which `self.log` is. With the
            defaults, and the Trainer's ``log_every_n_steps=50``, a row every 50 batches.
        quantities: What is logged of each layer, of "mean_gap", "var_gap", "lag", "noise", "var_lag", "var_noise",
            "dead" (fraction of channels without variance) and "nonfinite" (fraction of channels).
        log_layers: Patterns of layers that get keys of their own; None for all, if they are 64 or fewer, else none.
        trace_channels: Layer name -> channel, whose EMA and batch means are drawn; None for the first channels of the first,
            the middle and the last layer.
        alert_threshold: Warn, and alert in W&B, when the worst lag rises above so many sigma, and again only after it fell
            below half of it; None for never. At half a sigma the validation errors of our demo are wrong by tens of
            points.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors and the length of lists of images.
        layers: Glob patterns over qualified layer names; None for every layer that stores statistics.

    Raises:
        ValueError: At fit start: no logger, no layer, a channel that is not there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> from lightning_bn import BNStatsMonitor
        >>> trainer = Trainer(callbacks=[BNStatsMonitor()], logger=CSVLogger("logs"), enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.BNStatsMonitor
              init_args: {every_n_batches: 5, log_layers: "backbone.*"}
        ```
    """

    kind = "stats monitor"

    def __init__(
        self,
        every_n_batches: int = 5,
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
            raise ValueError(
                f"alert_threshold must be a positive number of sigma, or None, but is {alert_threshold!r}."
            )
        check_channels(trace_channels)
        if log_layers is not None:
            as_patterns(log_layers, "log_layers")
        as_patterns(layers)
        self.every_n_batches = every_n_batches
        self.window = window
        self.quantities = tuple(quantities)
        self.log_layers = log_layers
        self.trace_channels = trace_channels
        self.alert_threshold = alert_threshold
        self.layers = layers
        self._count = as_batch_size_fn(batch_size_fn)
        self._record: DriftRecord | None = None
        self._restored: dict[str, Any] = {}
        self._alarm = Alarm(float("inf"))
        self._batches = 0
        self._samples: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._record, self._restored, self._samples = None, {}, None
            self._move_behind_statistics_callbacks(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what could not be done later; begin, or go on."""
        super().on_fit_start(trainer, pl_module)
        if not trainer.loggers:
            raise ValueError(
                "BNStatsMonitor has no logger to log to (Trainer(logger=False)): give the Trainer one, for instance "
                "lightning.pytorch.loggers.CSVLogger('logs')."
            )
        layers = storing_layers(pl_module, self.layers)
        keys = safe_keys(layers)
        keyed = (
            keys
            if self.log_layers is None
            else match_names(keys, as_patterns(self.log_layers), "log_layers", "observed layer")
        )
        if self.log_layers is None and len(layers) > _MAX_KEYED:
            keyed = {}
        prefix = self._prefix(trainer)
        self._record = DriftRecord(
            layers, {name: keys[name] for name in keyed}, self.quantities, self.trace_channels, prefix
        )
        self._alarm = Alarm(self.alert_threshold or float("inf"))
        self._batches = 0
        if self._restored:
            self._batches, self._alarm.armed = self._restored["batches"], self._restored["armed"]
            try:
                self._record.load_state_dict(self._restored["record"])
            except ValueError as error:
                rank_zero_warn(f"BNStatsMonitor begins a new record: {error}")
        names = {index: {"layer": name, "key": key} for index, (name, key) in enumerate(keys.items())}
        with self._spared("could not log the names of layers"):
            plots.log_layer_names(trainer, f"{prefix}_layers", names)
            plots.summarize_by_max(trainer, [f"{prefix}_agg/{name}" for name in AGGREGATES if name.endswith("max")])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look, at every n-th batch; on rank 0, whose running statistics are those that every rank's forward uses."""
        self._batches += 1
        self._abandon()  # a batch that another hook has skipped
        if self._record and trainer.is_global_zero and self._batches % self.every_n_batches == 0:
            with self._spared("cannot tell the normalization batch size"):
                self._samples = self._count(batch)
            with self._spared("cannot measure a batch"):
                self._record.observer.before_batch()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """See what it was; log a row when a window is full."""
        if self._record:
            with self._spared("cannot measure a batch"):
                self._record.after_batch(log_step(trainer))
            if self._record.observer.batches >= self.window and logs_at_this_batch(trainer):
                with self._spared("could not log"):
                    self._log(trainer, self._record)
                rows = self._record.history.rows_seen
                if rows >= _FIRST_FIGURE_AT_ROW and rows.bit_count() == 1:
                    self._draw(trainer, self._record)

    def on_population_pass(self, trainer: Trainer, recomputed: PassResult) -> None:
        """Note how far PreciseBN, or FreezeBN at its switch, has moved each layer."""
        self._abandon()
        if self._record:
            with self._spared("cannot note what a pass moved"):
                self._record.note_pass(log_step(trainer), recomputed.statistics, recomputed.moved)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave no layer observed, should its batch have been skipped."""
        self._abandon()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left in the window, the pictures and the table."""
        if self._record and trainer.is_global_zero:
            self._conclude(trainer, self._record)
            if self._record.last is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_warn(
                    f"BNStatsMonitor logged nothing: of {self._batches} batches it measures one in "
                    f"{self.every_n_batches}, and a row takes two. Lower every_n_batches."
                )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no layer observed; a run that was broken off is one that somebody wants to look at."""
        self._abandon()
        if self._record and trainer.is_global_zero and trainer.state.fn == "fit":
            self._conclude(trainer, self._record)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no layer observed, should another callback have raised in its own."""
        self._abandon()

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far."""
        if self._record is None:
            return self._restored
        return {"record": self._record.state_dict(), "batches": self._batches, "armed": self._alarm.armed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the callback state; on_fit_start goes on from there."""
        self._restored = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the state, not the hold on layers."""
        return {**vars(self), "_record": None, "_restored": self.state_dict()}

    def _log(self, trainer: Trainer, record: DriftRecord) -> None:
        step, module = log_step(trainer), trainer.lightning_module
        if self._samples is not None:
            record.nbs = normalization_batch_size(module, samples=self._samples, layers=self.layers)
        row = record.take_row(step)
        assert record.last is not None
        lag = record.last.means.lag.nan_to_num(0.0)
        worst = int(lag.argmax())
        if self._alarm.sounds(float(lag[worst])):
            name = record.names[worst]
            frozen = record.last.direct.get(name) == "frozen"
            with self._spared("could not send its alert"):
                plots.alert(
                    trainer,
                    "BatchNorm statistics drift",
                    f"At step {step} the {'frozen statistics' if frozen else 'EMA'} of layer {name!r} is "
                    f"{float(lag[worst]):.2g} sigma off its batches. "
                    + ("The data have moved." if frozen else self._advice_on_drift(trainer, name)),
                )
        bad = [name for name, share in zip(record.names, record.last.nonfinite, strict=True) if share > 0]
        if bad and not record.nonfinite_said:
            record.nonfinite_said = True
            precise = "PreciseBNCallback" in self._present(trainer, bad[0])
            rank_zero_warn(
                f"BNStatsMonitor: {len(bad)} layers have seen NaN or infinite statistics up to step {step}, "
                f"{bad[0]!r} first. Running statistics keep them "
                + (
                    "until the next pass of PreciseBNCallback."
                    if precise
                    else "for ever: PreciseBNCallback replaces them."
                )
            )
        log_row(trainer, row)

    def _advice_on_drift(self, trainer: Trainer, layer: str) -> str:
        if "PreciseBNCallback" in self._present(trainer, layer):
            return "PreciseBNCallback recomputes it before evaluation; evaluations without a pass use it as it is."
        return "Evaluation uses the EMA: PreciseBNCallback recomputes it."

    def _draw(self, trainer: Trainer, record: DriftRecord) -> None:
        with self._spared(_NO_PICTURE):
            for name, figure in plots.pictures_of(record).items() if plots.any_logs(trainer) else ():
                plots.log_figure(trainer, f"{record.prefix}/{name}", figure, log_step(trainer))

    def _conclude(self, trainer: Trainer, record: DriftRecord) -> None:
        if record.observer.batches > 1:
            with self._spared("could not log"):
                self._log(trainer, record)
        if record.last is None or not plots.any_logs(trainer):
            return
        self._draw(trainer, record)
        with self._spared(_NO_PICTURE):
            step, history = log_step(trainer), record.history
            plots.log_figure(trainer, f"{record.prefix}/overview", plots.overview_of(record), step)
            plots.log_table(trainer, f"{record.prefix}/layers", COLUMNS, record.table(), step)
            lines = dict(zip(record.names, history["mean_gap"].T.tolist(), strict=True))
            title = "Mean gap of all layers (sigma)"
            plots.log_line_chart(trainer, f"{record.prefix}/all_layers", history.steps, lines, step, title=title)

    def _abandon(self) -> None:
        if self._record:
            self._record.observer.abandon()

    def _prefix(self, trainer: Trainer) -> str:
        """``bn``, or, if there are several monitors, one that says which layers and is no other's."""
        monitors = [c for c in trainer.callbacks if isinstance(c, BNStatsMonitor)]  # type: ignore[attr-defined]
        if len(monitors) == 1:
            return "bn"
        return "bn_" + list(safe_keys("_".join(as_patterns(m.layers)) for m in monitors).values())[monitors.index(self)]
