"""The experiment: train a model per normalization batch size (NBS), then estimate its statistics with every B.

Ghost BN divides the training batch if the NBS is smaller. All estimates of a draw use the same images.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch
from jsonargparse import Namespace  # type: ignore[attr-defined, unused-ignore]
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import lightning_bn as lbn
from lightning_bn.core.gaps import mean_gap, var_gap
from recipes.evaluation import copy_of_state, mean_and_spread, on_its_device, wrong_images
from recipes.images import ImageData
from recipes.run import Session
from recipes.tolerance import Stops, sweep_tolerances


@dataclass(frozen=True)
class Estimate:
    """One model with statistics from normalization batches of B images, once per draw of the images."""

    wrong: Tensor  # (draws, validation images): 1 is wrong, 0 is right
    gaps: Tensor  # (draws, layers, 2): mean and variance gap to the exact statistics of the same images
    seconds: list[float]

    def errors(self) -> list[float]:
        """Error in percent, by draw."""
        return [100 * float(error) for error in self.wrong.mean(1)]


@dataclass(frozen=True)
class Row:
    """A row of Table 2: the estimates of one model by B; the largest B is all images as one batch."""

    nbs: int  # normalization batch size of the training
    seed: int
    ema: Estimate  # without seconds
    precise: dict[int, Estimate]


@dataclass(frozen=True)
class Results:
    """All measurements."""

    data: str
    training_images: int
    validation_images: int
    images: int  # of every estimate
    layers: list[str]
    rows: list[Row]
    stops: list[Stops]

    def of(self, nbs: int) -> list[Row]:
        return [row for row in self.rows if row.nbs == nbs]

    @property
    def trained(self) -> list[int]:
        """The normalization batch sizes of the trainings."""
        return list(dict.fromkeys(row.nbs for row in self.rows))


def measure(session: Session) -> Results:
    """Trains every seed with every normalization batch size, and fills Table 2."""
    config = session.config
    rows: list[Row] = []
    stops: list[Stops] = []
    for seed in config.seeds:
        for nbs in config.nbs:
            made = train(session, nbs, seed)
            print(f"\nPreciseBN from {config.images:,} images, NBS {nbs}, seed {seed}")
            ema, precise = estimates_by_b(made.model, made.data, config.batch_sizes, config.images, config.draws)
            rows.append(Row(nbs, seed, ema, precise))
            if config.tolerances:
                stops.append(sweep_tolerances(made.model, made.data, f"NBS {nbs}, seed {seed}", config.tolerances))
    data, layers = made.data, list(lbn.find_bn(made.model))
    counts = data.num_training_images, data.num_validation_images, config.images
    return Results(data.source, *counts, layers, rows, stops)


def train(session: Session, nbs: int, seed: int) -> Namespace:
    """Trains once. The models of a seed differ only in how many images are normalized jointly."""

    def callbacks(made: Namespace) -> Sequence[Callback]:
        check_sizes(made.data, max(session.config.nbs), session.config.images)
        ghost = [lbn.GhostBNCallback(size=nbs)] if nbs < made.data.batch_size else []
        return [*ghost, PrintErrors()]

    return session.train(f"NBS {nbs}", seed, callbacks)


def check_sizes(data: ImageData, nbs: int, images: int) -> None:
    if nbs > data.batch_size:
        raise ValueError(f"nbs {nbs} is larger than the batch of {data.batch_size} images: raise --data.batch_size.")
    if images > data.num_training_images:
        raise ValueError(f"images is {images:,}, but there are only {data.num_training_images:,}: lower --images.")


class PrintErrors(L.Callback):
    """Prints each validation error."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch, error = trainer.current_epoch + 1, float(trainer.callback_metrics["val/error"])
        print(f"  epoch {epoch:<4} validation error {error:5.1f} % (EMA)")


def estimates_by_b(
    model: nn.Module, data: ImageData, batch_sizes: Sequence[int], images: int, draws: int
) -> tuple[Estimate, dict[int, Estimate]]:
    """Measures one model with EMA statistics, and with PreciseBN by B; restores the model afterwards."""
    sizes = [b for b in sorted(batch_sizes) if b < images] + [images]
    state = copy_of_state(model)
    validation = data.val_dataloader()
    ema_wrong = wrong_images(model, validation)[None]
    ema_gaps = []
    wrong: dict[int, list[Tensor]] = {b: [] for b in sizes}
    gaps: dict[int, list[Tensor]] = {b: [] for b in sizes}
    seconds: dict[int, list[float]] = {b: [] for b in sizes}
    for draw in range(draws):
        batches = data.training_sample(images, torch.Generator().manual_seed(draw))
        pixels = torch.cat([batch[0] for batch in batches])  # augmented once, so that every B sees the same images
        found = {}
        for b in sizes:
            model.load_state_dict(state)
            micro_batches = [(part,) for part in pixels.split(micro_batch_size(b, data.batch_size))]
            size: Literal["population"] | int = "population" if b == images else b
            started = time.perf_counter()
            found[b] = lbn.precise_bn(model, micro_batches, forward=on_its_device, normalization_batch_size=size)
            seconds[b].append(time.perf_counter() - started)
            wrong[b].append(wrong_images(model, validation))
        exact = found[images]
        for b in sizes:
            gaps[b].append(torch.tensor(list(found[b].gaps_to(exact).values())))
        model.load_state_dict(state)
        ema_gaps.append(torch.tensor(gaps_of_ema(model, exact)))
    precise = {b: Estimate(torch.stack(wrong[b]), torch.stack(gaps[b]), seconds[b]) for b in sizes}
    print(f"  EMA         validation error {mean_and_spread(ema_wrong)} %")
    for b, estimate in precise.items():
        print(f"  B = {b:<7,} validation error {mean_and_spread(estimate.wrong)} %   {sum(seconds[b]) / draws:.1f} s")
    return Estimate(ema_wrong, torch.stack(ema_gaps), []), precise


def gaps_of_ema(model: nn.Module, exact: lbn.PopulationStatistics) -> list[tuple[float, float]]:
    """Mean and variance gap of the running statistics to the exact ones, by layer."""
    gaps = []
    for name, bn in lbn.find_bn(model).items():
        mean, var = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
        of_mean = mean_gap(mean, exact[name].mean, exact[name].var)
        gaps.append((float(of_mean), float(var_gap(var, exact[name].var))))
    return gaps


def micro_batch_size(b: int, max_size: int) -> int:
    """The largest divisor of `b` that is at most `max_size`."""
    return max(size for size in range(1, min(b, max_size) + 1) if b % size == 0)
