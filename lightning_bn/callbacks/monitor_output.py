"""Output of `BNStatsMonitor`: alert, warning, figures and table."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn import plots
from lightning_bn.layers.find import Layers, as_patterns, match_names
from lightning_bn.tracking.drift import AGGREGATES
from lightning_bn.tracking.record import COLUMNS, DriftRecord
from lightning_bn.trainer.compat import log_step
from lightning_bn.trainer.logging import safe_keys

MAX_LAYERS_WITH_KEYS = 64
"""With more layers, none has keys by default: W&B advises fewer than 10,000 metrics per project."""


def layer_keys(layers: Iterable[str], log_layers: Layers) -> dict[str, str]:
    """Return the part of metric keys of each layer that matches ``log_layers``; None matches all, if they are few."""
    keys = safe_keys(layers)
    if log_layers is None:
        return keys if len(keys) <= MAX_LAYERS_WITH_KEYS else {}
    return {name: keys[name] for name in match_names(keys, as_patterns(log_layers), "log_layers", "observed layer")}


def log_layer_names(trainer: Trainer, record: DriftRecord) -> None:
    """Log the name and key of each layer by index, and declare which values W&B summarizes by their maximum."""
    keys = safe_keys(record.names)
    names = {index: {"layer": name, "key": key} for index, (name, key) in enumerate(keys.items())}
    plots.log_layer_names(trainer, key=f"{record.prefix}_layers", names=names)
    plots.summarize_by_max(trainer, [f"{record.prefix}_agg/{name}" for name in AGGREGATES if name.endswith("max")])


def worst_lag(record: DriftRecord) -> tuple[float, str]:
    """Return the largest lag of the last row, and the name of its layer."""
    assert record.last is not None
    lag = record.last.means.lag.nan_to_num(0.0)
    return float(lag.max()), record.names[int(lag.argmax())]


def send_alert(trainer: Trainer, record: DriftRecord, step: int, has_precise_bn: bool) -> None:
    """Warn of the layer with the largest lag, and alert in W&B."""
    assert record.last is not None
    lag, name = worst_lag(record)
    if record.last.direct.get(name) == "frozen":
        statistics, advice = "frozen statistics", "The data have moved."
    elif has_precise_bn:
        advice = "PreciseBNCallback recomputes it before evaluation; evaluations without a pass use it as it is."
        statistics = "EMA"
    else:
        statistics, advice = "EMA", "Evaluation uses the EMA: PreciseBNCallback recomputes it."
    message = f"At step {step} the {statistics} of layer {name!r} is {lag:.2g} sigma off its batches. {advice}"
    plots.alert(trainer, title="BatchNorm statistics drift", text=message)


def first_nonfinite(record: DriftRecord) -> str:
    """Return the first layer with a non-finite statistic in the last row; empty if there is none."""
    assert record.last is not None
    return next((name for name, share in zip(record.names, record.last.nonfinite, strict=True) if share > 0), "")


def warn_of_nonfinite(record: DriftRecord, step: int, has_precise_bn: bool) -> None:
    """Warn of layers with non-finite statistics in the last row."""
    assert record.last is not None
    until = "until the next pass of PreciseBNCallback" if has_precise_bn else "forever: PreciseBNCallback replaces them"
    rank_zero_warn(
        f"BNStatsMonitor: {int((record.last.nonfinite > 0).sum())} layers have seen NaN or infinite statistics up to "
        f"step {step}, {first_nonfinite(record)!r} first. Running statistics keep them {until}."
    )


def log_figures(trainer: Trainer, record: DriftRecord) -> None:
    """Log the figures of the run so far."""
    if plots.any_logs(trainer):
        for name, figure in plots.pictures_of(record).items():
            plots.log_figure(trainer, key=f"{record.prefix}/{name}", figure=figure, step=log_step(trainer))


def log_overview(trainer: Trainer, record: DriftRecord) -> None:
    """Log the figure of the whole run, the table of layers, and the chart of all layers."""
    if not plots.any_logs(trainer):
        return
    step, history = log_step(trainer), record.history
    plots.log_figure(trainer, key=f"{record.prefix}/overview", figure=plots.overview_of(record), step=step)
    plots.log_table(trainer, key=f"{record.prefix}/layers", columns=COLUMNS, rows=record.table(), step=step)
    lines = dict(zip(record.names, history["mean_gap"].T.tolist(), strict=True))
    key, title = f"{record.prefix}/all_layers", "Mean gap of all layers (sigma)"
    plots.log_line_chart(trainer, key=key, steps=history.steps, lines=lines, step=step, title=title)
