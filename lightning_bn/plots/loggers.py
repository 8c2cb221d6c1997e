"""Figures, tables, names and alerts to every logger, each in the form it shows best, or as files where it has none."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CHART_POINTS = 10_000
"""W&B's custom charts silently leave out what is beyond."""

ALERT_EVERY_SECONDS = 600
"""An alert with the same title is sent at most this often; for W&B, 0 would mean 60 s."""


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_figure(loggers: Any, key: str, figure: Figure, step: int) -> None:
    """Logs `figure` under `key`.

    W&B gets `log_image`, TensorBoard `add_image`, MLflow `log_figure`; CSVLogger and loggers not known here
    get the file `figures/<key>-<step>.png` in their log folder, or under the Trainer's `default_root_dir`.

    Args:
        loggers: A Trainer (all its loggers are used), one logger, or several.
        key: The name of the panel; `/` groups panels where the logger can.
        figure: What a function of `lightning_bn.plots` returned.
        step: The step the figure belongs to, on the axis of the other metrics.

    Raises:
        ValueError: A logger has neither an image panel known here nor a folder to write to, and no Trainer was given.
    """
    from lightning_bn.plots.style import save_png, to_rgb  # of matplotlib, which was needed to draw the figure

    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            logger.log_image(key, [to_rgb(figure)], step=step)
        elif kind == "TensorBoardLogger":
            logger.experiment.add_image(key, to_rgb(figure), step, dataformats="HWC")
        elif kind == "MLFlowLogger":
            logger.experiment.log_figure(logger.run_id, figure, f"figures/{key}-{step}.png")
        else:
            save_png(figure, _folder(logger, loggers) / "figures" / f"{key}-{step}.png")


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_layer_names(loggers: Any, key: str, names: Mapping[int, Mapping[str, Any]]) -> None:
    """Logs what a layer's number stands for, once, under `key`: metric names cannot hold a layer's whole name.

    W&B gets it in the run's config, TensorBoard as a text, MLflow as the artifact `<key>.json`; CSVLogger and
    loggers not known here get `figures/<key>.json`. Logging the same again, as a resumed run does, is harmless.

    Args:
        loggers: As in `log_figure`.
        key: The name it is filed under.
        names: The layer's number in the model's order -> what is known of it: its name as ``layer``, its part of
            metric keys as ``key`` (`lightning_bn.report` goes by these two), and whatever else there is.

    Raises:
        ValueError: As in `log_figure`.
    """
    plain = {str(index): dict(about) for index, about in names.items()}
    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            logger.experiment.config.update({key: plain}, allow_val_change=True)
        elif kind == "TensorBoardLogger":
            columns = list(dict.fromkeys(column for about in plain.values() for column in about))
            rows = [[index, *(about.get(column, "") for column in columns)] for index, about in plain.items()]
            logger.experiment.add_text(key, _markdown(["index", *columns], rows), 0)
        elif kind == "MLFlowLogger":
            logger.experiment.log_dict(logger.run_id, plain, f"{key}.json")
        else:
            path = _folder(logger, loggers) / "figures" / f"{key}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plain, indent=1), encoding="utf-8")


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_table(loggers: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Logs a table under `key`; meant for the end of a fit, since every table is an upload of its own at W&B.

    W&B gets a `wandb.Table`, TensorBoard a text with the table, MLflow the artifact `<key>.json`; CSVLogger and loggers
    not known here get `<key>.csv` in their log folder.

    Args:
        loggers: As in `log_figure`.
        key: The table's name.
        columns: The columns' names.
        rows: Numbers and texts, one for each column.
        step: The step the table belongs to.

    Raises:
        ValueError: As in `log_figure`.
    """
    rows = [list(row) for row in rows]
    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            logger.log_table(key, columns=list(columns), data=rows, step=step)
        elif kind == "TensorBoardLogger":
            logger.experiment.add_text(key, _markdown(columns, rows), step)
        elif kind == "MLFlowLogger":
            data = [[None if cell != cell else cell for cell in row] for row in rows]  # NaN is no JSON
            logger.experiment.log_dict(logger.run_id, {"columns": list(columns), "data": data}, f"{key}.json")
        else:
            path = _folder(logger, loggers) / f"{key}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *rows])


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_line_chart(
    loggers: Any, key: str, steps: Sequence[float], lines: Mapping[str, Sequence[float]], step: int, *, title: str = ""
) -> None:
    """Logs one chart with all `lines` to W&B, whose own panels hold ten lines at most; other loggers get nothing.

    W&B's custom charts show 10,000 points: of more, every second, third, ... step is kept. NaN is a gap in the line.

    Args:
        loggers: As in `log_figure`.
        key: The chart's name.
        steps: The x axis, shared by all lines.
        lines: Name -> one value a step.
        step: The step the chart belongs to, on the axis of the other metrics.
        title: Printed above the chart.
    """
    every = max(1, -(-len(steps) * len(lines) // MAX_CHART_POINTS))
    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            import wandb  # takes a second, which only its users should spend

            chart = wandb.plot.line_series(
                xs=list(steps)[::every],
                # NaN is no JSON: the browser would refuse the whole table.
                ys=[[value if value == value else None for value in values[::every]] for values in lines.values()],
                keys=list(lines),
                title=title,
                xname="training step",
                split_table=True,
            )
            logger.log_metrics({key: chart}, step)


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def alert(loggers: Any, title: str, text: str) -> None:
    """Warns, and with a `WandbLogger` sends a W&B alert as well, by mail or Slack as the user has set it there.

    Args:
        loggers: As in `log_figure`.
        title: What it is about. The same title is sent once in ten minutes.
        text: What is wrong, where, and what to do.
    """
    rank_zero_warn(f"{title}: {text}")
    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            logger.experiment.alert(title=title, text=text, level="WARN", wait_duration=ALERT_EVERY_SECONDS)


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def summarize_by_max(loggers: Any, keys: Iterable[str]) -> None:
    """Lets W&B's summary of a run hold the largest value of each key beside the last; other loggers have no summary.

    Args:
        loggers: As in `log_figure`.
        keys: Full names: with a pattern, W&B follows WandbLogger's own `*` at random.
    """
    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            for key in keys:
                logger.experiment.define_metric(key, step_metric="trainer/global_step", summary="max,last")


def any_logs(loggers: Any) -> bool:
    """Whether there is a logger that keeps anything: ``fast_dev_run`` has none, and drawing takes a second."""
    return next(_each(loggers), None) is not None


def _each(loggers: Any) -> Iterator[tuple[str, Any]]:
    """Every logger that logs anything, with its kind; "" for those that are not known here."""
    if hasattr(loggers, "loggers"):  # a Trainer
        loggers = loggers.loggers
    for logger in loggers if isinstance(loggers, Iterable) else [loggers]:
        # By name, because lightning.pytorch and pytorch_lightning hold two classes of every logger.
        names = {kind.__name__ for kind in type(logger).__mro__}
        if "DummyLogger" not in names:  # fast_dev_run logs nothing
            yield next(iter({"WandbLogger", "TensorBoardLogger", "MLFlowLogger"} & names), ""), logger


def _folder(logger: Any, loggers: Any) -> Path:
    getattr(logger, "experiment", None)  # CSVLogger makes its folder now, and would warn if it were not empty
    trainers = getattr(loggers, "default_root_dir", None)  # given a Trainer
    for folder in (getattr(logger, "log_dir", None), getattr(logger, "save_dir", None), trainers):
        if isinstance(folder, str | PathLike):
            return Path(folder)
    raise ValueError(
        f"{type(logger).__name__} takes no figures: it has no image panel known to lightning_bn, and "
        "neither a log_dir nor a save_dir to write PNG files to. Give it one of the two, pass the Trainer, or remove "
        "it from `loggers`."
    )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
