"""The experiment itself: train a model per normalization batch size, then estimate its statistics with every B.

Numbers only: `claims.py` judges them, `output.py` draws and writes them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

import lightning_bn as lbn
from lightning_bn.core.gaps import mean_gap, var_gap
from recipes.evaluation import mean_and_spread, on_its_device, wrong_images
from recipes.images import ImageData
from recipes.tolerance import Stops, sweep_tolerances

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """What one training run is made of; made anew for every model."""

    model: L.LightningModule
    data: ImageData
    trainer: dict[str, Any]  # arguments of the Trainer


@dataclass(frozen=True)
class Estimate:
    """One model with statistics from normalization batches of B images, once a draw of the images.

    `wrong` is (draws, validation images), 1 is wrong and 0 is right; `gaps` is (draws, layers, 2): the mean gap
    and the variance gap of every layer to the exact statistics of the same images.
    """

    wrong: Tensor
    gaps: Tensor
    seconds: list[float]


@dataclass(frozen=True)
class Row:
    """A row of Table 2: one model's estimates by B, of which the largest is all images as one batch."""

    nbs: int  # normalization batch size of the training
    seed: int
    ema: Estimate  # the statistics that the training left; its seconds are none
    precise: dict[int, Estimate]


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    data: str
    training_images: int
    validation_images: int
    images: int  # that every estimate is made from
    layers: list[str]
    rows: list[Row]
    stops: list[Stops]

    def of(self, nbs: int) -> list[Row]:
        return [row for row in self.rows if row.nbs == nbs]

    @property
    def trained(self) -> list[int]:
        """The models' normalization batch sizes, in the order that was asked for."""
        return list(dict.fromkeys(row.nbs for row in self.rows))


def precise_batch_size(
    make: Callable[[], Parts],
    make_logger: Callable[[int, int], Logger],
    *,
    seeds: Sequence[int] = (0,),
    nbs: Sequence[int] = (32, 2),
    batch_sizes: Sequence[int] = (2, 10, 100, 1000),
    images: int = 2000,
    draws: int = 3,
    tolerances: Sequence[float] = (),
    say: Say = print,
) -> Results:
    """Trains every seed with every normalization batch size, and fills Table 2.

    Args:
        make: Makes the parts of one training run.
        make_logger: Makes the logger of one training run, from its normalization batch size and seed.
        seeds: A model of each kind for each.
        nbs: Normalization batch sizes of the trainings: Ghost BN divides the training batch where it is larger.
        batch_sizes: The B of Table 2; all images as one batch is always added.
        images: Training images that every estimate is made from.
        draws: Draws of so many images, for the spread.
        tolerances: See where ``precise_bn(tolerance=)`` stops with each.
        say: Takes a line of progress.
    """
    if not seeds:
        raise ValueError("seeds is empty: give at least one, for instance --seeds [0].")
    _check_impossible(make().data, max(nbs), images)
    rows: list[Row] = []
    stops: list[Stops] = []
    for seed in seeds:
        for size in nbs:
            parts = train(size, seed, make, make_logger, say)
            rows.append(table_row(parts, size, seed, batch_sizes, images, draws, say))
            if tolerances:
                stops.append(sweep_tolerances(parts.model, parts.data, f"NBS {size}, seed {seed}", tolerances, say=say))
    data = parts.data
    layers = list(lbn.find_bn(parts.model))
    counts = data.num_training_images, data.num_validation_images, images
    return Results(data.source, *counts, layers, rows, stops)


def _check_impossible(data: ImageData, nbs: int, images: int) -> None:
    batch, there = data.batch_size, data.num_training_images
    if nbs > batch:
        raise ValueError(f"A batch of {batch} images cannot be normalized {nbs} together: raise --data.batch_size.")
    if images > there:
        raise ValueError(f"{images:,} images were asked for, but there are only {there:,}: lower --images.")


def train(nbs: int, seed: int, make: Callable[[], Parts], make_logger: Callable[[int, int], Logger], say: Say) -> Parts:
    """Trains once. The models of a seed differ in how many images are normalized together, and in nothing else."""
    say(f"\nTraining with NBS {nbs}, seed {seed}")
    L.seed_everything(seed, workers=True, verbose=False)
    parts = make()
    ghosts = [lbn.GhostBNCallback(size=nbs)] if nbs < parts.data.batch_size else []
    callbacks = [*(parts.trainer.get("callbacks") or []), *ghosts, _Progress(say)]
    trainer = L.Trainer(**{**parts.trainer, "callbacks": callbacks, "logger": make_logger(nbs, seed)})
    trainer.fit(parts.model, datamodule=parts.data)
    parts.model.to(trainer.strategy.root_device)
    return parts


class _Progress(L.Callback):
    """Says every validation error."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch, error = trainer.current_epoch + 1, float(trainer.callback_metrics["val/error"])
        self.say(f"  epoch {epoch:<4} validation error {error:5.1f} % (EMA)")


def table_row(parts: Parts, nbs: int, seed: int, batch_sizes: Sequence[int], images: int, draws: int, say: Say) -> Row:
    """Validation error of one model by B, with the same images for every B."""
    model, data = parts.model, parts.data
    sizes = [b for b in sorted(batch_sizes) if b < images] + [images]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    validation = data.val_dataloader()
    ema_wrong = wrong_images(model, validation)[None]
    say(f"\nPreciseBN from {images:,} images, NBS {nbs}, seed {seed} (EMA: {mean_and_spread(ema_wrong)} %)")

    wrong: dict[int, list[Tensor]] = {b: [] for b in sizes}
    gaps: dict[int, list[Tensor]] = {b: [] for b in sizes}
    seconds: dict[int, list[float]] = {b: [] for b in sizes}
    ema_gaps = []
    for draw in range(draws):
        drawn = data.training_sample(images, torch.Generator().manual_seed(draw))
        pixels = torch.cat([batch[0] for batch in drawn])  # augmented once, so that every B sees the same
        estimates = {}
        for b in sizes:
            model.load_state_dict(state)
            micro_batches = [(part,) for part in pixels.split(micro_batch(b, data.batch_size))]
            started = time.perf_counter()
            estimates[b] = lbn.precise_bn(
                model, micro_batches, forward=on_its_device, normalization_batch_size="population" if b == images else b
            )
            seconds[b].append(time.perf_counter() - started)
            wrong[b].append(wrong_images(model, validation))
        exact = estimates[images]
        for b in sizes:
            gaps[b].append(torch.tensor(list(estimates[b].gaps_to(exact).values())))
        model.load_state_dict(state)
        ema_gaps.append(torch.tensor(gaps_of_ema(model, exact)))
    precise = {b: Estimate(torch.stack(wrong[b]), torch.stack(gaps[b]), seconds[b]) for b in sizes}
    for b, estimate in precise.items():
        took = sum(estimate.seconds) / draws
        say(f"  B = {b:<7,} validation error {mean_and_spread(estimate.wrong)} %   {took:.1f} s")
    return Row(nbs, seed, Estimate(ema_wrong, torch.stack(ema_gaps), []), precise)


def gaps_of_ema(model: nn.Module, exact: lbn.PopulationStatistics) -> list[tuple[float, float]]:
    """Mean gap and variance gap of every layer's running statistics."""
    found = []
    for name, bn in lbn.find_bn(model).items():
        mean, var = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
        gap = mean_gap(mean, exact[name].mean, exact[name].var)
        found.append((float(gap), float(var_gap(var, exact[name].var))))
    return found


def micro_batch(b: int, loaded: int) -> int:
    """The largest micro-batch, of at most as many images as the loader's batch, of which whole ones make up B."""
    return max(size for size in range(1, min(b, loaded) + 1) if b % size == 0)
