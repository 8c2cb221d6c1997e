"""The experiment itself: three trainings, each evaluated with shared and with domain-specific population statistics.

What evaluation normalizes with does not change what is trained, so two rows of Table 5 are one model. Numbers only:
`claims.py` judges them, `output.py` draws and writes them.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_bn as lbn
from recipes.average_precision import AP
from recipes.detection import Parts, check_ragged_steps, evaluate, number_of_images, train
from recipes.shared_head.detector import HEADS, Detector

Say = Callable[[str], None]
Choice = Literal["shared", "domain"]


class Choices(NamedTuple):
    """What the levels share, and what each has for itself."""

    sgd: Choice
    population: Choice
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
TRAININGS = {(2 * number - 1, 2 * number): ROWS[2 * number] for number in (1, 2, 3)}
"""The rows that are one training: it keeps the statistics of each level, and those of all together anyway."""


@dataclass(frozen=True)
class Row:
    """A row of Table 5, for one seed."""

    row: int
    seed: int
    box: AP
    seconds: float  # of the training


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    data: str
    levels: int
    ranks: int
    steps: int
    images_per_step: int
    validation_images: int
    rows: list[Row]

    def of(self, row: int) -> list[Row]:
        """One a seed."""
        return [found for found in self.rows if found.row == row]


def shared_head(
    make: Callable[[], Parts[Detector]],
    *,
    seeds: Sequence[int] = (0,),
    rows: Sequence[int] = tuple(ROWS),
    ranks: int = 1,
    images_per_step: int = 4,
    precise_images: int = 400,
    parts: int = 5,
    say: Say = print,
) -> Results:
    """Trains every seed three times, and fills Table 5.

    Args:
        make: Makes the parts of one training run.
        seeds: Three trainings for each.
        rows: Of Table 5; what none of them needs is not trained.
        ranks: Processes of a training.
        images_per_step: Images of an optimizer step, on all ranks, accumulated if need be.
        precise_images: Training images from which PreciseBN estimates the population statistics of the trained model.
        parts: Equal parts of the validation images, each with an AP of its own, for the spread.
        say: Takes a line of progress.
    """
    if not seeds:
        raise ValueError("seeds is empty: give at least one, for instance --seeds [0].")
    if not rows or not set(rows) <= set(ROWS):
        raise ValueError(f"rows must be some of {', '.join(map(str, ROWS))}; got {list(rows)}.")
    found: list[Row] = []
    for seed in seeds:
        for both, choices in TRAININGS.items():
            asked = [row for row in both if row in rows]
            if not asked:
                continue
            L.seed_everything(seed, verbose=False)  # first weights, order of images
            made = make()
            check_ragged_steps("a training", ranks, made.data.images_per_gpu, images_per_step)
            with tempfile.TemporaryDirectory() as folder:
                saving = ModelCheckpoint(folder, filename="trained")
                precise = lbn.PreciseBNCallback(precise_images, layers=f"{HEADS}.*", batch_size_fn=number_of_images)
                started = time.perf_counter()
                steps = train(made, [choices.callback(made.model.levels), precise, saving], ranks, images_per_step)
                seconds = time.perf_counter() - started
                for row in asked:
                    evaluation = [ROWS[row].callback(made.model.levels)]
                    ap = evaluate(made, evaluation, parts, checkpoint=Path(folder) / "trained.ckpt")["bbox"]
                    found.append(Row(row, seed, ap, seconds))
                    say(f"seed {seed}  row {row}: box AP {ap.of_all:.1f}   ({seconds:.0f} s of training)")
    images = len(made.model.found)
    return Results(made.data.source, made.model.levels, ranks, steps, images_per_step, images, found)
