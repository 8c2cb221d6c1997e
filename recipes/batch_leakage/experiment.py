"""The experiment itself: train each arm, with BatchLeakageMonitor taking the errors of Fig. 8.

Numbers only: `claims.py` judges them, `output.py` draws and writes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.loggers import Logger

import lightning_bn as lbn
from recipes.batch_leakage.data import LeakyData

Say = Callable[[str], None]
Arm = Literal["random", "pattern", "pattern, Ghost BN"]
ARMS: tuple[Arm, ...] = get_args(Arm)
Statistics = Literal["population", "mini_batch", "same_pattern"]
STATISTICS: tuple[Statistics, ...] = get_args(Statistics)


@dataclass(frozen=True)
class Parts:
    """What one training run is made of; made anew for every arm."""

    model: L.LightningModule
    data: LeakyData
    trainer: dict[str, Any]  # arguments of the Trainer


@dataclass(frozen=True)
class Run:
    """One training: errors (%) after every epoch, and what the monitor said."""

    arm: Arm
    seed: int
    errors: dict[Statistics, list[float]]
    icc: list[float]  # of the most conspicuous layer, an epoch that was tested
    p_value: float  # of the run
    alarm: int | None  # the epoch, counted from 1; None if it stayed silent


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    data: str
    classes: int
    pattern: str
    training_images: int
    validation_images: int
    level: float  # share of runs without leakage that may alarm
    runs: list[Run]

    def of(self, arm: Arm) -> list[Run]:
        return [run for run in self.runs if run.arm == arm]


class Rows(Logger):
    """Keeps what the monitor logs; its pictures go to a folder."""

    name, version = "rows", 0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.rows: list[dict[str, float]] = []

    @property
    def log_dir(self) -> str:
        return str(self.folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def column(self, key: str) -> list[float]:
        """Every value logged under a key."""
        return [row[f"batch_leakage/{key}"] for row in self.rows if f"batch_leakage/{key}" in row]


class _Progress(L.Callback):
    """Says the errors of each epoch, and notes the epoch of the alarm."""

    def __init__(self, monitor: lbn.BatchLeakageMonitor, rows: Rows, say: Say) -> None:
        self.monitor, self.rows, self.say = monitor, rows, say
        self.alarm: int | None = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        said = ""
        if self.monitor.alarmed and self.alarm is None:
            self.alarm, said = epoch, "   ALARM"
        errors = [f"{words} {self.rows.column(f'{key}/val/error')[-1]:5.1f} %" for key, words in NAMES.items()]
        self.say(f"  epoch {epoch:<4} {', '.join(errors)}{said}")


NAMES: dict[Statistics, str] = {
    "population": "population",
    "mini_batch": "mini-batch, random",
    "same_pattern": "mini-batch, same pattern",
}


def batch_leakage(
    make: Callable[[], Parts],
    make_logger: Callable[[Arm, int], Logger | None],
    folder: Path,
    *,
    seeds: Sequence[int] = (0,),
    level: float = 0.01,
    say: Say = print,
) -> Results:
    """Trains every arm with every seed.

    Args:
        make: Makes the parts of one training run.
        make_logger: Makes the logger of one training run, from its arm and seed; None for no logger.
        folder: Where the monitor's pictures go.
        seeds: A model of each arm for each.
        level: The monitor's.
        say: Takes a line of progress.
    """
    if not seeds:
        raise ValueError("seeds is empty: give at least one, for instance --seeds [0].")
    data = make().data
    runs = [train(arm, seed, make, make_logger, level, folder, say) for seed in seeds for arm in ARMS]
    counts = data.num_training_images, data.num_validation_images
    return Results(data.source, data.num_classes, f"{data.classes} classes x {data.each}", *counts, level, runs)


def train(
    arm: Arm,
    seed: int,
    make: Callable[[], Parts],
    make_logger: Callable[[Arm, int], Logger | None],
    level: float,
    folder: Path,
    say: Say,
) -> Run:
    """Trains once. The arms of a seed start from the same weights."""
    say(f"\nTraining: {arm}, seed {seed}")
    L.seed_everything(seed, workers=True, verbose=False)
    parts = make()
    parts.data.pattern = arm != "random"
    monitor = lbn.BatchLeakageMonitor(alpha=level, log_errors=True, same_pattern=parts.data.same_pattern)
    rows = Rows(folder / f"{arm}, seed {seed}")
    progress = _Progress(monitor, rows, say)
    # As many images as classes: each is of another class, since interleaved groups separate neighbors.
    ghosts = [lbn.GhostBNCallback(size=parts.data.classes)] if arm == "pattern, Ghost BN" else []
    loggers = [logger for logger in (make_logger(arm, seed), rows) if logger]
    callbacks = [*(parts.trainer.get("callbacks") or []), *ghosts, monitor, progress]
    trainer = L.Trainer(**{**parts.trainer, "callbacks": callbacks, "logger": loggers})
    trainer.fit(parts.model, datamodule=parts.data)
    errors = {key: rows.column(f"{key}/val/error") for key in STATISTICS}
    return Run(arm, seed, errors, rows.column("icc_worst"), monitor.p_value, progress.alarm)
