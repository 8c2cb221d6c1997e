"""The experiment: three trainings, each evaluated with shared and with domain-specific population statistics.

The statistics of evaluation do not change what is trained, so two rows of Table 5 are one training.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_bn as lbn
from recipes.average_precision import AP
from recipes.detection import Parts, check_images_per_step, evaluate, number_of_images, train
from recipes.run import Session
from recipes.scenes import SceneData
from recipes.shared_head.detector import HEADS, Detector

Choice = Literal["shared", "domain"]


class Choices(NamedTuple):
    """What the levels share, and what is separate for each level."""

    train_statistics: Choice
    population_statistics: Choice
    affine: Choice

    def callback(self, levels: int) -> Callback:
        return lbn.DomainSpecificBNCallback(levels, level_modules=HEADS, **self._asdict())


ROWS = {
    1: Choices("shared", "shared", "shared"),
    2: Choices("shared", "domain", "shared"),
    3: Choices("domain", "shared", "shared"),
    4: Choices("domain", "domain", "shared"),
    5: Choices("domain", "shared", "domain"),
    6: Choices("domain", "domain", "domain"),
}
"""Table 5."""
TRAININGS = {(1, 2): ROWS[2], (3, 4): ROWS[4], (5, 6): ROWS[6]}
"""Two rows share a training. It keeps the statistics of each level; those of all levels are kept in any case."""


@dataclass(frozen=True)
class Row:
    """A row of Table 5, for one seed."""

    row: int
    seed: int
    box: AP
    seconds: float  # of the training


@dataclass(frozen=True)
class Results:
    """All measurements."""

    data: str
    levels: int
    ranks: int
    steps: int
    images_per_step: int
    validation_images: int
    rows: list[Row]

    def of(self, row: int) -> list[Row]:
        """Returns one row per seed."""
        return [found for found in self.rows if found.row == row]


def measure(session: Session) -> Results:
    """Trains every seed three times, and fills Table 5."""
    config = session.config
    if not config.rows or not set(config.rows) <= set(ROWS):
        raise ValueError(f"rows must be some of {', '.join(map(str, ROWS))}; got {list(config.rows)}.")
    batch = {"images_per_gpu": config.data.images_per_gpu, "images_per_step": config.images_per_step}
    check_images_per_step("a training", ranks=config.ranks, **batch)
    rows: list[Row] = []
    for seed in config.seeds:
        for pair in TRAININGS:
            chosen = [row for row in pair if row in config.rows]
            if chosen:
                made, steps, of_pair = train_and_evaluate(session, seed, pair, chosen)
                rows += of_pair
    images, levels = len(made.model.detections), made.model.levels
    return Results(made.data.source, levels, config.ranks, steps, config.images_per_step, images, rows)


def train_and_evaluate(
    session: Session, seed: int, pair: tuple[int, int], chosen: list[int]
) -> tuple[Parts[Detector], int, list[Row]]:
    """Trains once, saves a checkpoint with PreciseBN statistics, and evaluates it for the chosen rows."""
    config = session.config
    L.seed_everything(seed, verbose=False)  # first weights, order of images
    data = SceneData(**config.data.as_dict())
    made = Parts(Detector(data.num_classes, **config.model.as_dict()), data, config.trainer.as_dict())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        levels = TRAININGS[pair].callback(made.model.levels)
        precise = lbn.PreciseBNCallback(config.precise_images, layers=f"{HEADS}.*", batch_size_fn=number_of_images)
        saving = ModelCheckpoint(folder, filename="trained")
        started = time.perf_counter()
        steps = train(made, [levels, precise, saving], config.ranks, config.images_per_step)
        seconds = time.perf_counter() - started
        for row in chosen:
            callback = ROWS[row].callback(made.model.levels)
            ap = evaluate(made, [callback], config.parts, checkpoint=Path(folder) / "trained.ckpt")["bbox"]
            rows.append(Row(row, seed, ap, seconds))
            print(f"seed {seed}  row {row}: box AP {ap.all_images:.1f}   ({seconds:.0f} s of training)")
    return made, steps, rows
