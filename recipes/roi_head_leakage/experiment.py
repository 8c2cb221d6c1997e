"""The experiment itself: one training for every kind of head, evaluated once or twice for the rows of the tables.

Trainings of a seed see the same images in the same order, and take the same steps: with one image a rank, gradients of
two batches are accumulated. Numbers only: `claims.py` judges them, `output.py` draws and writes them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback

import lightning_bn as lbn
from recipes.average_precision import AP
from recipes.detection import Parts, check_ragged_steps, evaluate, number_of_images, train
from recipes.roi_head_leakage.detector import HEADS, Detector, Norm

Say = Callable[[str], None]
Inference = Literal["population", "mini-batch"]


@dataclass(frozen=True)
class Training:
    """What a head is trained with."""

    name: str
    norm: Norm
    images_per_gpu: int
    callback: type[Callback] | None = None

    def callbacks(self) -> list[Callback]:
        if self.callback is lbn.RoIShuffleCallback:
            return [lbn.RoIShuffleCallback(modules=HEADS)]
        return [lbn.SyncBNCallback(layers=f"{HEADS}.*")] if self.callback is lbn.SyncBNCallback else []

    @property
    def inferences(self) -> tuple[Inference, ...]:
        """The statistics that the tables evaluate it with; a head without BN has no choice."""
        return ("population", "mini-batch") if self.norm == "BN" and self.callback is None else ("population",)


TRAININGS = {
    "bn-1": Training("per-GPU BN", "BN", 1),
    "bn-2": Training("per-GPU BN", "BN", 2),
    "shuffle-1": Training("per-GPU BN + shuffle", "BN", 1, lbn.RoIShuffleCallback),
    "shuffle-2": Training("per-GPU BN + shuffle", "BN", 2, lbn.RoIShuffleCallback),
    "sync": Training("SyncBN", "BN", 2, lbn.SyncBNCallback),
    "none": Training("none", "none", 2),
    "gn": Training("GN", "GN", 2),
}


@dataclass(frozen=True)
class Row:
    """A row of Tables 3 and 6, for one seed."""

    training: str  # key of TRAININGS
    inference: Inference
    seed: int
    box: AP
    mask: AP | None
    seconds: float  # of the training


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    data: str
    ranks: int
    steps: int
    images_per_step: int
    validation_images: int
    rows: list[Row]

    def of(self, training: str, inference: Inference = "population") -> list[Row]:
        """One a seed."""
        return [row for row in self.rows if (row.training, row.inference) == (training, inference)]


def roi_head_leakage(
    make: Callable[[Norm, int], Parts[Detector]],
    *,
    seeds: Sequence[int] = (0,),
    trainings: Sequence[str] = tuple(TRAININGS),
    ranks: int = 2,
    images_per_step: int = 4,
    parts: int = 5,
    say: Say = print,
) -> Results:
    """Trains every seed with every kind of head, and fills Tables 3 and 6.

    Args:
        make: Makes the parts of one training run, from the norm of its head and the images of a rank's batch.
        seeds: A training of each kind for each.
        trainings: Keys of `TRAININGS`.
        ranks: Processes of a training.
        images_per_step: Images of an optimizer step, on all ranks, accumulated if need be.
        parts: Equal parts of the validation images, each with an AP of its own, for the spread.
        say: Takes a line of progress.
    """
    _check_impossible(seeds, trainings, ranks, images_per_step)
    rows: list[Row] = []
    for seed in seeds:
        for key in trainings:
            training = TRAININGS[key]
            L.seed_everything(seed, verbose=False)  # first weights, order of images, and every rank's regions
            made = make(training.norm, training.images_per_gpu)
            started = time.perf_counter()
            steps = train(made, training.callbacks(), ranks, images_per_step)
            seconds = time.perf_counter() - started
            for inference in training.inferences:
                ap = evaluate(made, evaluation(inference), parts)
                rows.append(Row(key, inference, seed, ap["bbox"], ap.get("segm"), seconds))
                say(
                    f"seed {seed}  {training.name}, {training.images_per_gpu} a rank, {inference}: "
                    f"box AP {ap['bbox'].of_all:.1f}   ({seconds:.0f} s of training)"
                )
    return Results(made.data.source, ranks, steps, images_per_step, len(made.model.found), rows)


def evaluation(inference: Inference) -> list[Callback]:
    """Callbacks of an evaluation, image by image."""
    if inference == "population":
        return []
    return [lbn.MiniBatchInferenceCallback(["validate"], layers=f"{HEADS}.*", batch_size_fn=number_of_images)]


def _check_impossible(seeds: Sequence[int], trainings: Sequence[str], ranks: int, images_per_step: int) -> None:
    if not seeds:
        raise ValueError("seeds is empty: give at least one, for instance --seeds [0].")
    unknown = [key for key in trainings if key not in TRAININGS]
    if unknown or not trainings:
        raise ValueError(f"trainings must be some of {', '.join(TRAININGS)}; got {unknown or 'none'}.")
    for key in trainings:
        check_ragged_steps(f"training {key}", ranks, TRAININGS[key].images_per_gpu, images_per_step)
