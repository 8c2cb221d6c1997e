"""Claim: BNStatsMonitor can stay on: at its default cadence nobody notices it, in time, on disk or in memory.

One fit a network, in which plain training, the monitor and `wandb.watch`, which logs gradients, take turns.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torchvision
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import Tensor, nn

from benchmarks.timing import Spread, ratio
from lightning_bn import BNStatsMonitor

TITLE = "BNStatsMonitor costs under 1 % of a training step"
CLAIM = (
    "`lightning_bn.BNStatsMonitor` costs under 1 % of a training step at its default cadence (every 5th batch), and "
    "under 5 % when it measures every batch."
)
MOST = {"monitor, defaults": 1.0, "monitor, every batch": 5.0}

NETWORKS = ("resnet18", "resnet50")
THREADS = 2
CYCLE = 50
"""Batches of a turn: the Trainer's default log_every_n_steps, so that every turn logs one row."""
WATCHED = 5
FIRST_PICTURES = 32 * CYCLE
"""Steps until the monitor draws for the first time; then at twice as many, four times as many, and so on."""
STEPS = 1000
LAYERS = (10, 60, 200)


@dataclass(frozen=True)
class Shape:
    """The batches of a fit, and how long turns are taken."""

    samples: int
    pixels: int
    minutes: float

    def __str__(self) -> str:
        return f"{self.samples} of {self.pixels} px"


# the smaller the images, the more the fixed cost of a callback weighs
SHAPES = {"cpu": (Shape(32, 32, 4.5),), "cuda": (Shape(32, 32, 1.0), Shape(32, 224, 1.0))}


class Classifier(LightningModule):
    """Trains a network; its loss is logged, so that plain training logs rows, too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Watch(Callback):
    """`wandb.watch` at the monitor's cadence, for the length of a turn."""

    batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.batches % CYCLE == 0:
            wandb.watch(pl_module, log_freq=WATCHED, idx=0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.batches += 1
        if self.batches % CYCLE == 0:
            wandb.unwatch(pl_module)


class Turns(Callback):
    """Hands a fit's hooks to one contestant after the other, for a cycle each, and keeps the time.

    Whichever is first in a round is last in the next; a turn without any warms up.

    Args:
        contestants: Name -> callback.
        minutes: No new round begins after so many, but for the second.
        device: Where the network is.
        waits: Whether to wait for the device around hooks, too: that tells what is theirs, but slows the turn down.

    Attributes:
        seconds: Name -> seconds of each turn, from its first batch's start to the next turn's.
        hooks: Name -> seconds of these spent in the contestant's hooks.
    """

    def __init__(self, contestants: Mapping[str, Callback], minutes: float, device: str, waits: bool) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in contestants}
        self.hooks: dict[str, list[float]] = {name: [] for name in contestants}
        self._contestants = contestants
        self._device, self._device_of_hooks = device, device if waits else "cpu"
        self._seconds = 60 * minutes
        self._batches = 0
        self._order = self._turns()
        self._now: str | None = None

    def _turns(self) -> Iterator[str]:
        names, end = list(self._contestants), time.perf_counter() + self._seconds
        yield ""
        for number in count():
            if number >= 2 and time.perf_counter() > end:
                return
            first = number % len(names)
            yield from names[first:] + names[:first]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for contestant in self._contestants.values():
            contestant.on_fit_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._batches % CYCLE == 0:
            _wait(self._device)
            if self._now:
                self.seconds[self._now].append(time.perf_counter() - self._started)
                self.hooks[self._now].append(self._in_hooks)
            self._now = next(self._order, None)
            trainer.should_stop = self._now is None  # after this batch
            gc.collect()
            self._in_hooks, self._started = 0.0, time.perf_counter()
        self._batches += 1
        self._hand_on("on_train_batch_start", trainer, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        self._hand_on("on_train_batch_end", *args)

    def _hand_on(self, hook: str, *args: Any) -> None:
        if self._now:
            _wait(self._device_of_hooks)
            started = time.perf_counter()
            getattr(self._contestants[self._now], hook)(*args)
            _wait(self._device_of_hooks)
            self._in_hooks += time.perf_counter() - started


@dataclass(frozen=True)
class Row:
    """One network, shape and contestant; costs in percent of a step without."""

    case: str
    name: str
    own: Spread | None
    whole: Spread
    milliseconds: float

    def missed(self) -> bool:
        """Whether the median, as it is printed, is not under what it should be under."""
        return self.own is not None and round(self.own.median, 3) >= UNDER[self.name]

    def __str__(self) -> str:
        own = f"{self.own}{' **missed**' if self.missed() else ''}" if self.own else "-"
        return f"| {self.case} | {self.name} | {own} | {self.whole} | {self.milliseconds:.1f} |"


def report(device: str, quick: bool) -> str:
    """Measure everything on a device; tables, what was missed, and how it was measured, as Markdown."""
    torch.set_num_threads(THREADS)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: list[Row] = []
    kept: list[str] = []
    for network, shape in product(NETWORKS[:1] if quick else NETWORKS, QUICK if quick else SHAPES[device]):
        measured, sentence = _measure(network, shape, device)
        print(*measured, sentence, sep="\n", flush=True)
        rows, kept = rows + measured, [*kept, sentence]
    layers, steps = (LAYERS[:1], 2 * CYCLE) if quick else (LAYERS, STEPS)
    watched = max(row.whole.median for row in rows if row.name == WATCH)
    return "\n".join(
        [
            "| network | batch | with | in its own hooks, % of a step | step over plain step, % more | ms a step |",
            "|---|---|---|---|---|---|",
            *map(str, rows),
            "",
            *[_verdict(rows, name) for name in UNDER],
            f"- `wandb.watch` at the same cadence: up to {watched:.1f} % of a step; at its own default, log_freq=1000, "
            f"a 200th of that, {watched / 200:.2f} %, for a 200th of the looks.",
            *kept,
            "",
            f"| BatchNorm layers | figures a row | rows in {steps} steps | W&B run file | metrics.csv "
            "| at the end, W&B | at the end, CSVLogger |",
            "|---|---|---|---|---|---|---|",
            *[_on_disk(number, steps) for number in layers],
            "",
            "**Method.** torchvision networks with random weights on random images, float32, SGD, "
            f"{THREADS} CPU threads, one `Trainer.fit` with an offline `WandbLogger`. In it plain training, the monitor "
            f"at its defaults, the monitor at every batch and `wandb.watch(log_freq={WATCHED})` take turns of {CYCLE} "
            "batches, so that each turn logs one row; their order rotates. A step is timed from one "
            "`on_train_batch_start` to the next, own hooks by a clock around them, logging included"
            + (" (in a fit of its own, which waits for the GPU around them)" if device == "cuda" else "")
            + ". Median over turns and, in brackets, quartiles; the column over plain is a ratio within a round. "
            "The claim rests on own hooks, all that the monitor does in this process: one percent is less than "
            "the noise of whole steps, which are there to show that nothing large happens elsewhere (W&B's own process "
            "is in them alone). `wandb.watch` works inside backward and cannot be told apart. It logs histograms of "
            "gradients, not statistics of BatchNorm, and of ten looks in a turn the logged row holds the last. "
            "Second table: what the monitor adds to a fit that logs its loss, files of an offline run and of a "
            "CSVLogger; pictures are PNG files, in W&B each is also a row.",
        ]
    )


def _measure(network: str, shape: Shape, device: str) -> tuple[list[Row], str]:
    torch.manual_seed(0)
    module = Classifier(getattr(torchvision.models, network)(weights=None).to(device))
    images = torch.randn(shape.samples, 3, shape.pixels, shape.pixels, device=device)
    batch = images, torch.randint(1000, (shape.samples,), device=device)
    with TemporaryDirectory() as folder, _wandb_logger(folder) as logger:
        monitor = BNStatsMonitor()
        names = dict(zip(UNDER, (monitor, BNStatsMonitor(every_n_batches=1)), strict=True))
        contestants = {PLAIN: Callback(), **names, WATCH: Watch()}
        turns = own = Turns(contestants, shape.minutes, device, waits=False)
        trainer = _fit(module, batch, turns, [logger], device)
        if device == "cuda":
            own = Turns(contestants, shape.minutes, device, waits=True)
            trainer = _fit(module, batch, own, [logger], device)
        record = monitor._record
        assert record is not None
        started = time.perf_counter()
        monitor._draw(trainer, record)
        drawn = time.perf_counter() - started
        bytes_kept = _bytes(monitor.state_dict())
    milliseconds = {name: 1000 * Spread.of(values).median / CYCLE for name, values in turns.seconds.items()}
    rows = []
    for name in contestants:
        shares = [100 * h / (s - h) for h, s in zip(own.hooks[name], own.seconds[name], strict=True)]
        more = Spread.of([100 * (a / b - 1) for a, b in zip(turns.seconds[name], turns.seconds[PLAIN], strict=True)])
        hooks = Spread.of(shares) if name in UNDER else None
        rows.append(Row(f"{network} | {shape}", name, hooks, more, milliseconds[name]))
    channels = sum(layer.num_features for layer in record.layers.values())
    return rows, (
        f"- {network}, {shape}: a set of pictures takes {drawn:.1f} s; as the first is drawn after {FIRST_PICTURES} "
        f"steps and the next after twice as many, that is at most {100 * drawn / (FIRST_PICTURES * milliseconds[PLAIN] / 1000):.2f} % "
        f"of a run. The state is {bytes_kept / 1024:.0f} KiB, {bytes_kept / channels:.0f} bytes a channel."
    )


def _on_disk(layers: int, steps: int) -> str:
    torch.manual_seed(0)
    batch = torch.randn(8, 10), torch.randint(10, (8,))
    sizes = []
    for callback in (Callback(), BNStatsMonitor()):
        module = Classifier(nn.Sequential(*[nn.BatchNorm1d(10) for _ in range(layers)]))
        with TemporaryDirectory() as folder:
            with _wandb_logger(folder) as logger:
                table = CSVLogger(folder, name="csv", version="")
                _fit(module, batch, callback, [logger, table], "cpu", steps)
            sizes.append(_sizes(Path(folder)))
    return ""


