"""`log_figure`: one figure to every logger, into its image panel, or as a PNG file where it has none."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from lightning_bn.plots.style import save_png, to_rgb


@rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
def log_figure(loggers: Any, key: str, figure: Figure, step: int) -> None:
    """Logs `figure` under `key`.

    W&B gets `log_image`, TensorBoard `add_image`, MLflow `log_figure`; CSVLogger and loggers not known here
    get the file `figures/<key>-<step>.png` in their log folder.

    Args:
        loggers: A Trainer (all its loggers are used), one logger, or several.
        key: The name of the panel; `/` groups panels where the logger can.
        figure: What a function of `lightning_bn.plots` returned.
        step: The step the figure belongs to, on the axis of the other metrics.

    Raises:
        ValueError: A logger has neither an image panel known here nor a folder to write to.
    """
    for logger in _each(loggers):
        # By name, because lightning.pytorch and pytorch_lightning hold two classes of every logger.
        kinds = {kind.__name__ for kind in type(logger).__mro__}
        if "WandbLogger" in kinds:
            logger.log_image(key, [to_rgb(figure)], step=step)
        elif "TensorBoardLogger" in kinds:
            logger.experiment.add_image(key, to_rgb(figure), step, dataformats="HWC")
        elif "MLFlowLogger" in kinds:
            logger.experiment.log_figure(logger.run_id, figure, f"figures/{key}-{step}.png")
        elif "DummyLogger" not in kinds:  # fast_dev_run logs nothing
            save_png(figure, _folder(logger) / "figures" / f"{key}-{step}.png")


def _each(loggers: Any) -> Iterable[Any]:
    if hasattr(loggers, "loggers"):  # a Trainer
        return cast(Iterable[Any], loggers.loggers)
    return loggers if isinstance(loggers, Iterable) else [loggers]


def _folder(logger: Any) -> Path:
    for folder in (getattr(logger, "log_dir", None), getattr(logger, "save_dir", None)):
        if isinstance(folder, str | PathLike):
            return Path(folder)
    raise ValueError(
        f"{type(logger).__name__} takes no figures: it has no image panel known to lightning_bn, and "
        "neither a log_dir "
        "nor a save_dir to write PNG files to. Give it one of the two, or remove it from `loggers`."
    )
