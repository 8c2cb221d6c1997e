"""The experiment itself: train both arms, then put the questions of Table 1 and Fig. 2 to the checkpoints.

Numbers only: `claims.py` judges them, `output.py` draws and writes them.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from tqdm import tqdm

import lightning_bn as lbn
from recipes.evaluation import mean_and_spread, on_its_device, wrong_images
from recipes.images import ImageData
from recipes.tolerance import Stops, sweep_tolerances

Arm = Literal["EMA", "PreciseBN"]
State = Mapping[str, Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """What one training run is made of; made anew for every arm and seed."""

    model: L.LightningModule
    data: ImageData
    precise_bn: lbn.PreciseBNCallback
    monitor: lbn.BNStatsMonitor
    trainer: dict[str, Any]  # arguments of the Trainer


@dataclass
class Run:
    """One training run, recorded at every validation."""

    arm: Arm
    seed: int
    epochs: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)  # validation error, %
    weights: list[str] = field(default_factory=list)  # a hash of all parameters
    states: list[State] = field(default_factory=list)  # the whole model
    steps: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """A row of Table 1: which validation images a checkpoint gets wrong, with EMA and with PreciseBN.

    `ema` is (1, images) and `precise[n]` is (draws, images); 1 is wrong, 0 is right.
    """

    seed: int
    epoch: float
    ema: Tensor
    precise: dict[int, Tensor]


@dataclass(frozen=True)
class Cloud:
    """Fig. 2 for every channel of every BN layer.

    `ema` holds the running means after each training step, (steps, channels); `batch_means[step]` those of
    many batches under the fixed weights of that step, (batches, channels); `std[step]` the population's,
    (channels,).
    """

    channels: list[tuple[str, int]]  # (layer, channel) of each column
    ema: Tensor
    batch_means: dict[int, Tensor]
    std: dict[int, Tensor]


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    data: str
    training_images: int
    validation_images: int
    runs: list[Run]
    sweeps: list[Sweep]
    cloud: Cloud
    stops: list[Stops] = field(default_factory=list)

    def of(self, arm: Arm) -> list[Run]:
        return [run for run in self.runs if run.arm == arm]


def ema_vs_precise(
    make: Callable[[], Parts],
    make_logger: Callable[[Arm, int], Logger],
    *,
    seeds: Sequence[int] = (0,),
    samples: Sequence[int] = (10, 100, 1000),
    draws: int = 5,
    cloud_batches: int = 16,
    tolerances: Sequence[float] = (),
    say: Say = print,
) -> Results:
    """Trains every seed with and without PreciseBN, and measures both.

    Args:
        make: Makes the parts of one training run.
        make_logger: Makes the logger of one training run.
        seeds: A pair of runs each.
        samples: The N of Table 1; the whole training population is always added.
        draws: Draws of N samples, for the spread.
        cloud_batches: Batch means in each cloud of Fig. 2.
        tolerances: See where ``precise_bn(tolerance=)`` stops with each.
        say: Takes a line of progress.
    """
    if not seeds:
        raise ValueError("seeds is empty: give at least one, for instance --seeds [0].")
    runs: list[Run] = []
    sweeps: list[Sweep] = []
    stops: list[Stops] = []
    cloud: Cloud | None = None
    for seed in seeds:
        trace = EMATrace()
        ema, parts = train("EMA", seed, make, make_logger, say, trace=trace)
        precise, _ = train("PreciseBN", seed, make, make_logger, say, compare=ema)
        runs += [ema, precise]

        # From here on only the EMA arm's checkpoints are needed: PreciseBN is a question one asks a fixed
        # model.
        for index in unconverged_and_final(len(ema.errors)):
            sweeps.append(sweep_samples(parts, ema, index, samples, draws, say))
            if tolerances:
                parts.model.load_state_dict(ema.states[index])
                name = f"epoch {ema.epochs[index]:.3g}, seed {seed}"
                stops.append(sweep_tolerances(parts.model, parts.data, name, tolerances, say=say))
        if cloud is None:
            say(f"\nBatch means of {cloud_batches} batches at each of {len(ema.states)} checkpoints")
            cloud = batch_mean_cloud(parts, ema, trace, cloud_batches)
    assert cloud is not None
    data = parts.data
    return Results(data.source, data.num_training_images, data.num_validation_images, runs, sweeps, cloud, stops)


def unconverged_and_final(checkpoints: int) -> list[int]:
    """The two checkpoints of Table 1: 30 % through training, as the paper's epoch 30 of 100, and the last."""
    return sorted({max(0, round(0.3 * checkpoints) - 1), checkpoints - 1})


def train(
    arm: Arm,
    seed: int,
    make: Callable[[], Parts],
    make_logger: Callable[[Arm, int], Logger],
    say: Say,
    *,
    trace: "EMATrace | None" = None,
    compare: Run | None = None,
) -> tuple[Run, Parts]:
    """Trains once. The arms differ in one callback, PreciseBN, and in nothing else."""
    say(f"\n{arm}, seed {seed}")
    L.seed_everything(seed, workers=True, verbose=False)
    parts = make()
    run = Run(arm, seed)
    callbacks: list[L.Callback] = [parts.monitor, *([parts.precise_bn] if arm == "PreciseBN" else [])]
    callbacks += [trace] if trace else []
    callbacks += [Recorder(run, say, compare)]
    settings = {**parts.trainer, "callbacks": [*(parts.trainer.get("callbacks") or []), *callbacks]}
    trainer = L.Trainer(**{**settings, "logger": make_logger(arm, seed)})
    started = time.perf_counter()
    trainer.fit(parts.model, datamodule=parts.data)
    run.seconds = time.perf_counter() - started
    parts.model.to(trainer.strategy.root_device)
    return run, parts


class Recorder(L.Callback):
    """Keeps what `Run` holds, and says it."""

    def __init__(self, run: Run, say: Say, compare: Run | None) -> None:
        self.run, self.say, self.compare = run, say, compare

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run = self.run
        run.epochs.append(trainer.global_step / trainer.num_training_batches)
        run.steps.append(trainer.global_step)
        run.errors.append(float(trainer.callback_metrics["val/error"]))
        run.weights.append(hash_of_parameters(pl_module))
        run.states.append({name: value.cpu().clone() for name, value in pl_module.state_dict().items()})
        beside = f"   (EMA: {self.compare.errors[len(run.errors) - 1]:5.1f} %)" if self.compare else ""
        self.say(f"  epoch {run.epochs[-1]:4.3g}   validation error {run.errors[-1]:5.1f} %{beside}")


class EMATrace(L.Callback):
    """The running means of all layers after every training step."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.means.append(torch.cat([bn.get_buffer("running_mean") for bn in lbn.find_bn(pl_module).values()]).cpu())


def hash_of_parameters(model: nn.Module) -> str:
    """Equal for equal bits of all parameters; buffers, so also running statistics, are left out."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def sweep_samples(parts: Parts, run: Run, index: int, samples: Sequence[int], draws: int, say: Say) -> Sweep:
    """Validation error of one checkpoint with statistics from N training images, `draws` times for each N."""
    population = parts.data.num_training_images
    sizes = [n for n in samples if n < population] + [population]
    say(f"\nPreciseBN with N images, seed {run.seed}, epoch {run.epochs[index]:.3g} (EMA: {run.errors[index]:.1f} %)")
    validation = parts.data.val_dataloader()
    parts.model.load_state_dict(run.states[index])
    ema = wrong_images(parts.model, validation)[None]
    precise: dict[int, Tensor] = {}
    for n in sizes:
        wrong = []
        for draw in range(draws if n < population else 1):  # the whole population can be drawn in one way only
            parts.model.load_state_dict(run.states[index])
            images = parts.data.training_sample(n, torch.Generator().manual_seed(draw))
            lbn.precise_bn(parts.model, images, forward=on_its_device)
            wrong.append(wrong_images(parts.model, validation))
        precise[n] = torch.stack(wrong)
        say(f"  N = {n:<7,} validation error {mean_and_spread(precise[n])} %")
    return Sweep(run.seed, run.epochs[index], ema, precise)


def batch_mean_cloud(parts: Parts, run: Run, trace: EMATrace, batches: int) -> Cloud:
    """The mean of every channel in each of `batches` training batches, for every checkpoint."""
    channels = [(name, c) for name, bn in lbn.find_bn(parts.model).items() for c in range(bn.num_features)]
    batch_means: dict[int, Tensor] = {}
    std: dict[int, Tensor] = {}
    checkpoints = list(zip(run.steps, run.states, strict=True))
    for step, state in tqdm(checkpoints, desc="batch means", leave=False, disable=None):
        parts.model.load_state_dict(state)
        # The population of a single batch is that batch.
        seen = [
            lbn.precise_bn(parts.model, [batch], forward=on_its_device).values()
            for batch in islice(parts.data.train_dataloader(), batches)
        ]
        means = torch.stack([torch.cat([layer.mean for layer in layers]) for layers in seen]).cpu()
        variances = torch.stack([torch.cat([layer.var for layer in layers]) for layers in seen]).cpu()
        batch_means[step] = means
        std[step] = (variances.mean(0) + means.var(0, correction=0)).sqrt()  # Eq. 2, batches of one size
    return Cloud(channels, torch.stack(trace.means), batch_means, std)
