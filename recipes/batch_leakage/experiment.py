"""The experiment: train on each kind of batches, while BatchLeakageMonitor measures the three errors of Fig. 8."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from jsonargparse import Namespace  # type: ignore[attr-defined, unused-ignore]
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

import lightning_bn as lbn
from recipes.run import Session

Arm = Literal["random", "pattern", "pattern, Ghost BN"]
ARMS: tuple[Arm, ...] = get_args(Arm)
Statistics = Literal["population", "mini_batch", "same_pattern"]
STATISTICS: dict[Statistics, str] = {
    "population": "population",
    "mini_batch": "mini-batch, random",
    "same_pattern": "mini-batch, same pattern",
}


@dataclass(frozen=True)
class Training:
    """One training: errors (%) after every epoch, and the monitor's results."""

    arm: Arm
    seed: int
    errors: dict[Statistics, list[float]]
    icc: list[float]  # of the worst layer, for every epoch that was tested
    p_value: float  # of the whole training
    alarm: int | None  # epoch of the alarm, counted from 1


@dataclass(frozen=True)
class Results:
    """All measurements."""

    data: str
    classes: int
    pattern: str
    training_images: int
    validation_images: int
    trainings: list[Training]

    def of(self, arm: Arm) -> list[Training]:
        return [training for training in self.trainings if training.arm == arm]


def measure(session: Session) -> Results:
    """Trains every seed on each kind of batches."""
    trainings = []
    for seed in session.config.seeds:
        for arm in ARMS:
            training, data = train(session, arm, seed)
            trainings.append(training)
    counts = data.num_training_images, data.num_validation_images
    return Results(data.source, data.num_classes, f"{data.classes} classes x {data.each}", *counts, trainings)


def train(session: Session, arm: Arm, seed: int) -> tuple[Training, Any]:
    """Trains once. The trainings of a seed have the same first weights."""
    rows = Rows(session.folder / "monitor" / f"{arm}, seed {seed}")
    callbacks: list[Any] = []

    def prepare(made: Namespace) -> Sequence[Callback]:
        data = made.data
        data.pattern = arm != "random"
        monitor = lbn.BatchLeakageMonitor(alpha=session.config.alpha, log_errors=True, same_pattern=data.same_pattern)
        # Interleaved groups of as many images as classes: neighbors, which are of one class, are in different groups.
        ghost = [lbn.GhostBNCallback(size=data.classes)] if arm == "pattern, Ghost BN" else []
        callbacks.extend([*ghost, monitor, Progress(monitor, rows)])
        return callbacks

    made = session.train(arm, seed, prepare, [rows])
    monitor, progress = callbacks[-2:]
    errors = {key: rows.column(f"{key}/val/error") for key in STATISTICS}
    return Training(arm, seed, errors, rows.column("icc_worst"), monitor.p_value, progress.alarm), made.data


class Rows(Logger):
    """Keeps the metrics of the monitor; its figures are saved in a folder."""

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
        pass

    def column(self, key: str) -> list[float]:
        return [row[f"batch_leakage/{key}"] for row in self.rows if f"batch_leakage/{key}" in row]


class Progress(L.Callback):
    """Prints the errors of each epoch, and records the epoch of the alarm."""

    def __init__(self, monitor: lbn.BatchLeakageMonitor, rows: Rows) -> None:
        self.monitor, self.rows = monitor, rows
        self.alarm: int | None = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        text = ", ".join(
            f"{name} {self.rows.column(f'{key}/val/error')[-1]:5.1f} %" for key, name in STATISTICS.items()
        )
        if self.monitor.alarmed and self.alarm is None:
            self.alarm = epoch
            text += "   ALARM"
        print(f"  epoch {epoch:<4} {text}")
