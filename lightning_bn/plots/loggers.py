"""Sends figures, tables, layer names and alerts to loggers; writes files where a logger has no place for them."""

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

MAX_CHART_POINTS = 10_000  # W&B's custom charts silently drop further points
ALERT_EVERY_SECONDS = 600  # W&B sends an alert with the same title at most this often


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_figure(loggers: Any, *, key: str, figure: Figure, step: int) -> None:
    """Logs a figure.

    Uses `log_image` of W&B, `add_image` of TensorBoard and `log_figure` of MLflow. CSVLogger and unknown loggers get
    the file `figures/<key>-<step>.png` in their log folder, or in the Trainer's `default_root_dir`.

    Args:
        loggers: A Trainer (all its loggers are used), one logger, or several.
        key: The name; `/` groups figures where the logger can.
        figure: The figure.
        step: The step, on the axis of the other metrics.

    Raises:
        ValueError: A logger is unknown and has no folder, and no Trainer was given.
    """
    from lightning_bn.plots.style import save_png, to_rgb  # imports matplotlib, which drawing the figure needed anyway

    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            logger.log_image(key, [to_rgb(figure)], step=step)
        elif kind == "TensorBoardLogger":
            logger.experiment.add_image(key, to_rgb(figure), step, dataformats="HWC")
        elif kind == "MLFlowLogger":
            logger.experiment.log_figure(logger.run_id, figure, f"figures/{key}-{step}.png")
        else:
            save_png(figure, _file(logger, loggers, f"figures/{key}-{step}.png"))


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_layer_names(loggers: Any, *, key: str, names: Mapping[int, Mapping[str, Any]]) -> None:
    """Logs the names of layers: number -> columns, with the name as ``layer`` and its part of metric keys as ``key``.

    W&B gets them in the run's config, TensorBoard as text, MLflow as the artifact `<key>.json`, other loggers as
    `figures/<key>.json`. Logging the same names again, as a resumed run does, is safe.
    """
    by_index = {str(index): dict(about) for index, about in names.items()}
    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            logger.experiment.config.update({key: by_index}, allow_val_change=True)
        elif kind == "TensorBoardLogger":
            columns = list(dict.fromkeys(column for about in by_index.values() for column in about))
            rows = [[index, *(about.get(column, "") for column in columns)] for index, about in by_index.items()]
            logger.experiment.add_text(key, _markdown(["index", *columns], rows), 0)
        elif kind == "MLFlowLogger":
            logger.experiment.log_dict(logger.run_id, by_index, f"{key}.json")
        else:
            _file(logger, loggers, f"figures/{key}.json").write_text(json.dumps(by_index, indent=1), encoding="utf-8")


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_table(loggers: Any, *, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Logs a table: as `wandb.Table`, TensorBoard text, MLflow artifact `<key>.json`, or `<key>.csv` in the log folder.

    Use it at the end of a fit, because W&B uploads every table separately.
    """
    columns, rows = list(columns), [list(row) for row in rows]
    for kind, logger in _each(loggers):
        if kind == "WandbLogger":
            logger.log_table(key, columns=columns, data=rows, step=step)
        elif kind == "TensorBoardLogger":
            logger.experiment.add_text(key, _markdown(columns, rows), step)
        elif kind == "MLFlowLogger":
            table = {"columns": columns, "data": [_none_for_nan(row) for row in rows]}
            logger.experiment.log_dict(logger.run_id, table, f"{key}.json")
        else:
            with _file(logger, loggers, f"{key}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *rows])


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_line_chart(
    loggers: Any,
    *,
    key: str,
    steps: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    step: int,
    title: str = "",
) -> None:
    """Logs all `lines` (one value per entry of `steps`) as one chart to W&B, whose own panels show ten lines at most.

    Other loggers get nothing. Long lines are thinned out, and NaN is a gap in the line.
    """
    every = max(1, -(-len(steps) * len(lines) // MAX_CHART_POINTS))
    values = [_none_for_nan(line[::every]) for line in lines.values()]
    for logger in _wandb_loggers(loggers):
        import wandb  # takes a second to import

        axes: dict[str, Any] = {"xs": list(steps)[::every], "xname": "training step", "split_table": True}
        chart = wandb.plot.line_series(ys=values, keys=list(lines), title=title, **axes)
        logger.log_metrics({key: chart}, step)


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def alert(loggers: Any, *, title: str, text: str) -> None:
    """Warns, and sends a W&B alert (by mail or Slack) if there is a `WandbLogger`; the same title every ten minutes."""
    rank_zero_warn(f"{title}: {text}")
    for logger in _wandb_loggers(loggers):
        logger.experiment.alert(title=title, text=text, level="WARN", wait_duration=ALERT_EVERY_SECONDS)


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def summarize_by_max(loggers: Any, keys: Iterable[str]) -> None:
    """Adds the maximum of each key to W&B's summary of the run; other loggers have no summary."""
    for logger in _wandb_loggers(loggers):
        for key in keys:  # full names, because W&B may apply WandbLogger's `*` instead of another pattern
            logger.experiment.define_metric(key, step_metric="trainer/global_step", summary="max,last")


def any_logs(loggers: Any) -> bool:
    """Returns whether any logger keeps what it gets; with ``fast_dev_run``, none does."""
    return next(_each(loggers), None) is not None


def _each(loggers: Any) -> Iterator[tuple[str, Any]]:
    """Yields each logger with its kind, "" if it is unknown."""
    if hasattr(loggers, "loggers"):  # a Trainer
        loggers = loggers.loggers
    for logger in loggers if isinstance(loggers, Iterable) else [loggers]:
        # Compare names, because lightning.pytorch and pytorch_lightning define two classes of each logger.
        names = {kind.__name__ for kind in type(logger).__mro__}
        if "DummyLogger" not in names:  # used by fast_dev_run, logs nothing
            yield next(iter({"WandbLogger", "TensorBoardLogger", "MLFlowLogger"} & names), ""), logger


def _wandb_loggers(loggers: Any) -> list[Any]:
    return [logger for kind, logger in _each(loggers) if kind == "WandbLogger"]


def _file(logger: Any, loggers: Any, name: str) -> Path:
    getattr(logger, "experiment", None)  # creates CSVLogger's folder; later it would warn that it is not empty
    of_trainer = getattr(loggers, "default_root_dir", None)
    for folder in (getattr(logger, "log_dir", None), getattr(logger, "save_dir", None), of_trainer):
        if isinstance(folder, str | PathLike):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            return path
    raise ValueError(
        f"{type(logger).__name__} takes no figures: lightning_bn does not know it, and it has neither a log_dir nor a "
        "save_dir to write PNG files to. Give it one of the two, pass the Trainer, or remove it from `loggers`."
    )


def _none_for_nan(cells: Sequence[Any]) -> list[Any]:
    return [None if cell != cell else cell for cell in cells]  # JSON has no NaN


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
