"""The experiment: one training for every kind of head, evaluated with one or two kinds of statistics.

Trainings of a seed see the same images in the same order, and take the same steps. With one image per rank, gradients
of two batches are accumulated.
"""

import time
from dataclasses import dataclass
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback

import lightning_bn as lbn
from recipes.average_precision import AP
from recipes.detection import Parts, check_images_per_step, evaluate, number_of_images, train
from recipes.roi_head_leakage.detector import HEADS, Detector, Norm
from recipes.run import Session
from recipes.scenes import SceneData

Inference = Literal["population", "mini-batch"]


@dataclass(frozen=True)
class Training:
    """A kind of head, and how it is trained."""

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
        """The statistics of its evaluations in the tables; a head without BN has no choice."""
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
    """All measurements."""

    data: str
    ranks: int
    steps: int
    images_per_step: int
    validation_images: int
    rows: list[Row]

    def of(self, training: str, inference: Inference = "population") -> list[Row]:
        """One a seed."""
        return [row for row in self.rows if (row.training, row.inference) == (training, inference)]


def measure(session: Session) -> Results:
    """Trains every seed with every kind of head, and fills Tables 3 and 6."""
    config = session.config
    unknown = [key for key in config.trainings if key not in TRAININGS]
    if unknown or not config.trainings:
        raise ValueError(f"trainings must be some of {', '.join(TRAININGS)}; got {unknown or 'none'}.")
    for key in config.trainings:
        batch = {"images_per_gpu": TRAININGS[key].images_per_gpu, "images_per_step": config.images_per_step}
        check_images_per_step(f"training {key}", ranks=config.ranks, **batch)
    rows: list[Row] = []
    for seed in config.seeds:
        for key in config.trainings:
            training = TRAININGS[key]
            L.seed_everything(seed, verbose=False)  # first weights, order of images, and the regions of every rank
            data = SceneData(**config.data.as_dict(), images_per_gpu=training.images_per_gpu)
            model = Detector(data.num_classes, training.norm, **config.model.as_dict())
            made = Parts(model, data, config.trainer.as_dict())
            started = time.perf_counter()
            steps = train(made, training.callbacks(), config.ranks, config.images_per_step)
            seconds = time.perf_counter() - started
            for inference in training.inferences:
                ap = evaluate(made, evaluation(inference), config.parts)
                rows.append(Row(key, inference, seed, ap["bbox"], ap.get("segm"), seconds))
                job = f"{training.name}, {training.images_per_gpu} per rank, {inference}"
                print(f"seed {seed}  {job}: box AP {ap['bbox'].all_images:.1f}   ({seconds:.0f} s of training)")
    images = len(made.model.detections)
    return Results(made.data.source, config.ranks, steps, config.images_per_step, images, rows)


def evaluation(inference: Inference) -> list[Callback]:
    """Returns the callbacks of an evaluation image by image."""
    if inference == "population":
        return []
    return [lbn.MiniBatchInferenceCallback(["validate"], layers=f"{HEADS}.*", batch_size_fn=number_of_images)]
