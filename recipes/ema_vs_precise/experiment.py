"""The experiment: train without and with PreciseBN, then evaluate the checkpoints with other statistics.

Both trainings of a seed have the same weights, since PreciseBN changes only running statistics. So one model is
evaluated with two kinds of statistics. Two checkpoints then get statistics from N images (Table 1), and all of them
the batch means of many batches (Fig. 2).
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import Namespace  # type: ignore[attr-defined, unused-ignore]
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from tqdm import tqdm

import lightning_bn as lbn
from recipes.evaluation import copy_of_state, mean_and_spread, on_its_device, wrong_images
from recipes.images import ImageData
from recipes.run import Session
from recipes.tolerance import Stops, sweep_tolerances

Arm = Literal["EMA", "PreciseBN"]


@dataclass
class Training:
    """One training, recorded at every validation."""

    arm: Arm
    seed: int
    epochs: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)  # validation error, %
    weights: list[str] = field(default_factory=list)  # a hash of all parameters
    states: list[Mapping[str, Tensor]] = field(default_factory=list)  # of the whole model
    steps: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """A row of Table 1. `ema` is (1, images) and `precise[n]` is (draws, images): 1 is wrong, 0 is right."""

    seed: int
    epoch: float
    ema: Tensor
    precise: dict[int, Tensor]

    def errors(self, n: int) -> list[float]:
        """Error in percent, by draw."""
        return [100 * float(error) for error in self.precise[n].mean(1)]


@dataclass(frozen=True)
class Cloud:
    """Fig. 2 for all channels of all BN layers."""

    channels: list[tuple[str, int]]  # (layer, channel) of each column
    ema: Tensor  # running means after each training step, (steps, channels)
    batch_means: dict[int, Tensor]  # step -> means of batches with the weights of that step, (batches, channels)
    std: dict[int, Tensor]  # step -> the population's, (channels,)


@dataclass(frozen=True)
class Results:
    """All measurements."""

    data: str
    training_images: int
    validation_images: int
    trainings: list[Training]
    sweeps: list[Sweep]
    cloud: Cloud
    stops: list[Stops] = field(default_factory=list)

    def of(self, arm: Arm) -> list[Training]:
        return [training for training in self.trainings if training.arm == arm]

    def sweeps_by_epoch(self) -> dict[float, list[Sweep]]:
        epochs = sorted({sweep.epoch for sweep in self.sweeps})
        return {epoch: [sweep for sweep in self.sweeps if sweep.epoch == epoch] for epoch in epochs}


def measure(session: Session) -> Results:
    """Trains every seed without and with PreciseBN, and evaluates the checkpoints."""
    config = session.config
    trainings: list[Training] = []
    sweeps: list[Sweep] = []
    stops: list[Stops] = []
    cloud: Cloud | None = None
    for seed in config.seeds:
        trace = EMATrace()
        ema, made = train(session, "EMA", seed, trace=trace)
        precise, _ = train(session, "PreciseBN", seed, compare=ema)
        trainings += [ema, precise]
        # Evaluate the checkpoints of the EMA training. The callback had no influence on them.
        for index in unconverged_and_final(len(ema.errors)):
            sweeps.append(sweep_samples(made.model, made.data, ema, index, config.samples, config.draws))
            if config.tolerances:
                made.model.load_state_dict(ema.states[index])
                name = f"epoch {ema.epochs[index]:.3g}, seed {seed}"
                stops.append(sweep_tolerances(made.model, made.data, name, config.tolerances))
        if cloud is None:
            cloud = batch_mean_cloud(made.model, made.data, ema, trace, config.cloud_batches)
    assert cloud is not None
    data = made.data
    return Results(data.source, data.num_training_images, data.num_validation_images, trainings, sweeps, cloud, stops)


def unconverged_and_final(checkpoints: int) -> list[int]:
    """Indices of Table 1's checkpoints: at 30 % of the training, as the paper's epoch 30 of 100, and the last."""
    return sorted({max(0, round(0.3 * checkpoints) - 1), checkpoints - 1})


def train(
    session: Session, arm: Arm, seed: int, *, trace: "EMATrace | None" = None, compare: Training | None = None
) -> tuple[Training, Namespace]:
    """Trains once. The two arms differ in the PreciseBN callback only."""
    training = Training(arm, seed)

    def callbacks(made: Namespace) -> Sequence[Callback]:
        precise = [made.precise_bn] if arm == "PreciseBN" else []
        return [made.monitor, *precise, *([trace] if trace else []), Recorder(training, compare)]

    started = time.perf_counter()
    made = session.train(arm, seed, callbacks)
    training.seconds = time.perf_counter() - started
    return training, made


class Recorder(L.Callback):
    """Records and prints each validation, beside that of another training."""

    def __init__(self, training: Training, compare: Training | None) -> None:
        self.training, self.compare = training, compare

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        training = self.training
        training.epochs.append(trainer.global_step / trainer.num_training_batches)
        training.steps.append(trainer.global_step)
        training.errors.append(float(trainer.callback_metrics["val/error"]))
        training.weights.append(hash_of_parameters(pl_module))
        training.states.append(copy_of_state(pl_module))
        beside = f"   (EMA: {self.compare.errors[len(training.errors) - 1]:5.1f} %)" if self.compare else ""
        print(f"  epoch {training.epochs[-1]:4.3g}   validation error {training.errors[-1]:5.1f} %{beside}")


class EMATrace(L.Callback):
    """Keeps the running means of all layers after every training step."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.means.append(torch.cat([bn.get_buffer("running_mean") for bn in lbn.find_bn(pl_module).values()]).cpu())


def hash_of_parameters(model: nn.Module) -> str:
    """Equal if all parameters are bit-identical; buffers, including running statistics, are ignored."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def sweep_samples(
    model: nn.Module, data: ImageData, training: Training, index: int, samples: Sequence[int], draws: int
) -> Sweep:
    """Measures the validation error of one checkpoint with statistics from N training images, for every N and draw."""
    population, epoch = data.num_training_images, training.epochs[index]
    print(f"\nPreciseBN with N images, seed {training.seed}, epoch {epoch:.3g} (EMA: {training.errors[index]:.1f} %)")
    validation = data.val_dataloader()
    model.load_state_dict(training.states[index])
    ema = wrong_images(model, validation)[None]
    precise: dict[int, Tensor] = {}
    for n in [n for n in samples if n < population] + [population]:
        wrong = []
        for draw in range(draws if n < population else 1):  # there is one draw of the whole population
            model.load_state_dict(training.states[index])
            images = data.training_sample(n, torch.Generator().manual_seed(draw))
            lbn.precise_bn(model, images, forward=on_its_device, normalization_batch_size="loader")
            wrong.append(wrong_images(model, validation))
        precise[n] = torch.stack(wrong)
        print(f"  N = {n:<7,} validation error {mean_and_spread(precise[n])} %")
    return Sweep(training.seed, epoch, ema, precise)


def batch_mean_cloud(model: nn.Module, data: ImageData, training: Training, trace: EMATrace, batches: int) -> Cloud:
    """Measures the mean of every channel in `batches` training batches, for every checkpoint."""
    print(f"\nBatch means of {batches} batches at each of {len(training.states)} checkpoints")
    channels = [(name, c) for name, bn in lbn.find_bn(model).items() for c in range(bn.num_features)]
    batch_means: dict[int, Tensor] = {}
    std: dict[int, Tensor] = {}
    checkpoints = list(zip(training.steps, training.states, strict=True))
    for step, state in tqdm(checkpoints, desc="batch means", leave=False, disable=None):
        model.load_state_dict(state)
        # The population of a single batch is that batch.
        layers = [
            lbn.precise_bn(model, [batch], forward=on_its_device, normalization_batch_size="loader").values()
            for batch in islice(data.train_dataloader(), batches)
        ]
        means = torch.stack([torch.cat([layer.mean for layer in of_batch]) for of_batch in layers]).cpu()
        variances = torch.stack([torch.cat([layer.var for layer in of_batch]) for of_batch in layers]).cpu()
        batch_means[step] = means
        std[step] = (variances.mean(0) + means.var(0, correction=0)).sqrt()  # Eq. 2, batches of one size
    return Cloud(channels, torch.stack(trace.means), batch_means, std)
