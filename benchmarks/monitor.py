"""Claim: BNStatsMonitor can stay on: with its defaults it needs little time, disk and memory.

In one fit, plain training, the monitor and `wandb.watch`, which logs gradients, take turns.
"""

from __future__ import annotations

import csv
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, cycle, product
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

from benchmarks.timing import Spread
from lightning_bn import BNStatsMonitor
from lightning_bn.callbacks.monitor_output import log_figures
from lightning_bn.core.moments import Moments
from lightning_bn.tracking.history import MAX_ROWS
from lightning_bn.tracking.record import DriftRecord

TITLE = "BNStatsMonitor costs under 1 % of a training step"
CLAIM = (
    "`lightning_bn.BNStatsMonitor` costs under 1 % of a training step at its default cadence, every 5th batch, and "
    "under 5 % when it measures every batch."
)
PLAIN, DEFAULT, EVERY, WATCH = "nothing", "monitor, defaults", "monitor, every batch", "wandb.watch, log_freq=5"
UNDER = {DEFAULT: 1.0, EVERY: 5.0}

NETWORKS = ("resnet18", "resnet50")
SAMPLES = 32
PIXELS = {"cpu": (32,), "cuda": (32, 224)}  # the smaller the images, the more a callback weighs
MINUTES = {"cpu": 1.0, "cuda": 0.5}
THREADS = 2
CYCLE = 50
"""Batches per turn: the Trainer's default ``log_every_n_steps``, so every turn logs one row."""
FIRST_DRAWN = 32 * CYCLE
"""Steps before the first set of figures; the next set follows after twice as many."""
LAYERS, STEPS = (10, 60, 200), 1000


class Classifier(LightningModule):
    """Trains a network and logs its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A step takes the same time at rate 0, and no gradient becomes denormal, which would be slow.
        return torch.optim.SGD(self.parameters(), 0.0, momentum=0.9)


class Watch(Callback):
    """`wandb.watch` at the monitor's cadence, for a turn at a time."""

    batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.batches % CYCLE == 0:
            wandb.watch(pl_module, log_freq=5, idx=0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.batches += 1
        if self.batches % CYCLE == 0:
            wandb.unwatch(pl_module)


class Turns(Callback):
    """Gives each contestant a cycle of batches in turn, and measures the time.

    The order rotates, after a turn of plain training. No round begins after ``minutes``, but there are at least two.
    ``seconds`` has the time of each contestant's turns, ``hooks`` the part in its hooks. A GPU is synchronized at both
    ends of every hook, including the empty ones of plain training.
    """

    def __init__(self, contestants: Mapping[str, Callback], minutes: float, device: str) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in contestants}
        self.hooks: dict[str, list[float]] = {name: [] for name in contestants}
        self._contestants, self._device = contestants, device
        self._order = self._turns(list(contestants), 60 * minutes)
        self._now: str | None = None
        self._batches, self._started, self._in_hooks = 0, 0.0, 0.0

    def _turns(self, names: list[str], seconds: float) -> Iterator[str | None]:
        yield None
        end = time.perf_counter() + seconds
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
            now = self._clock()
            if self._now:
                self.seconds[self._now].append(now - self._started)
                self.hooks[self._now].append(self._in_hooks)
            self._now = next(self._order, None)
            trainer.should_stop = self._batches > 0 and self._now is None  # after this batch
            gc.collect()
            self._in_hooks, self._started = 0.0, time.perf_counter()
        self._batches += 1
        self._hand_on("on_train_batch_start", trainer, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        self._hand_on("on_train_batch_end", *args)

    def _hand_on(self, hook: str, *args: Any) -> None:
        if self._now:
            started = self._clock()
            getattr(self._contestants[self._now], hook)(*args)
            self._in_hooks += self._clock() - started

    def _clock(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Row:
    """One network, shape and contestant; costs in percent of a step without it."""

    case: str
    name: str
    hooks: Spread
    whole: Spread
    milliseconds: float

    def missed(self) -> bool:
        """Whether the printed median is not below the target."""
        return round(self.hooks.median, 3) >= UNDER[self.name]

    def __str__(self) -> str:
        hooks = f"{self.hooks}{' **missed**' if self.missed() else ''}" if self.name in UNDER else "-"
        return f"| {self.case} | {self.name} | {hooks} | {self.whole} | {self.milliseconds:.1f} |"


def report(device: str, quick: bool) -> str:
    """Measures on a device; returns tables, verdicts and method in Markdown."""
    torch.set_num_threads(THREADS)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: list[Row] = []
    further: list[str] = []
    for network, pixels in product(NETWORKS[:1] if quick else NETWORKS, PIXELS[device]):
        measured, about = _measure(network, 4 if quick else SAMPLES, pixels, device, 0 if quick else MINUTES[device])
        print(*measured, about, sep="\n", flush=True)
        rows, further = rows + measured, [*further, about]
    layers, steps = (LAYERS[:1], 2 * CYCLE) if quick else (LAYERS, STEPS)
    watch = max(row.whole.median for row in rows if row.name == WATCH)
    return "\n".join(
        [
            "| network | batch | with | in its hooks, % of a step | whole step, % more than plain | ms per step |",
            "|---|---|---|---|---|---|",
            *map(str, rows),
            "",
            *[_verdict(rows, name) for name in UNDER],
            f"- `wandb.watch` at the cadence of the monitor's defaults: up to {watch:.1f} %; at its default, "
            f"`log_freq=1000`, a 200th of that, {watch / 200:.2f} %, for a 200th of the histograms.",
            *further,
            "",
            f"| BatchNorm layers | values per row | rows in {steps} steps | metrics.csv, KiB | W&B run file, KiB "
            "| figures at the end | tables at the end |",
            "|---|---|---|---|---|---|---|",
            *[_on_disk(number, steps) for number in layers],
            "",
            "**Method.** torchvision networks with random weights on random images, float32, SGD at rate 0, "
            f"{THREADS} CPU threads, one `Trainer.fit` with an offline `WandbLogger`. In it plain training, the "
            f"monitor and `wandb.watch` take turns of {CYCLE} batches, in rotating order; each turn logs one row. "
            "Hooks "
            "are timed directly (a GPU is synchronized), whole steps relative to the plain ones of the same round. "
            "Medians, with quartiles in brackets. **The claim is about the hooks.** The monitor does nothing outside "
            "of "
            "them (it reads no inputs here), and one percent of a whole step is less than the noise. The column of "
            "whole steps shows that noise, and W&B's process. `wandb.watch` works inside backward and cannot be "
            "separated. It logs histograms of gradients ten times per turn, of which W&B keeps the last. Figures are "
            "timed, and memory is counted, for a full history. The second table is what the monitor adds to a fit that "
            "logs its loss: files of a CSVLogger and an offline W&B run, where every figure and table is another row.",
        ]
    )


def _measure(network: str, samples: int, pixels: int, device: str, minutes: float) -> tuple[list[Row], str]:
    torch.manual_seed(0)
    module = Classifier(getattr(torchvision.models, network)(weights=None))
    images = torch.randn(8, samples, 3, pixels, pixels, device=device)
    monitor = BNStatsMonitor()
    contestants = {PLAIN: Callback(), DEFAULT: monitor, EVERY: BNStatsMonitor(every_n_batches=1), WATCH: Watch()}
    turns = Turns(contestants, minutes, device)
    with TemporaryDirectory() as folder, _wandb_logger(folder) as logger:
        trainer = _fit(module, images, [turns], [logger])
        assert monitor._record is not None
        held, bytes_a_channel = _fill(monitor._record)
        started = time.perf_counter()
        log_figures(trainer, monitor._record)
        drawn = time.perf_counter() - started
    case, rows, plain = f"{network} | {samples} of {pixels} px", [], turns.seconds[PLAIN]
    for name, seconds in turns.seconds.items():
        inside = [100 * h / (s - h) for h, s in zip(turns.hooks[name], seconds, strict=True)]
        more = [100 * (s / p - 1) for s, p in zip(seconds, plain, strict=True)]
        rows.append(Row(case, name, Spread.of(inside), Spread.of(more), 1000 * Spread.of(seconds).median / CYCLE))
    until_drawn = FIRST_DRAWN * Spread.of(plain).median / CYCLE
    return rows, (
        f"- {network}, {samples} of {pixels} px, {len(plain)} rounds: a set of figures takes {drawn:.1f} s. Drawn "
        f"after {FIRST_DRAWN} steps and whenever they have doubled, it takes at most {100 * drawn / until_drawn:.2f} % "
        f"of a run. The monitor holds at most {held / 2**20:.1f} MiB, of which {bytes_a_channel:.0f} bytes per channel."
    )


def _fill(record: DriftRecord) -> tuple[int, float]:
    """Fills the history with the last row; returns the bytes of all tensors, and of those per channel."""
    assert record.last is not None
    for row in range(4 * MAX_ROWS):
        record.traces.add(row, record.traces.points[-1])
        if row < MAX_ROWS:
            record.history.add(row, record.last.per_layer())
    for _ in range(15):  # most of the steps that may wait for their arithmetic
        record.observer.before_batch()
        record.observer.after_batch()
    observing = _bytes(vars(record.observer)) + _bytes(vars(record.observer._recorder))
    history = _bytes(record.history.state_dict()) + _bytes(record.traces.state_dict())
    return observing + history, observing / sum(layer.num_features for layer in record.layers.values())


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Moments):
        return _bytes(vars(value))
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, inside))


def _on_disk(layers: int, steps: int) -> str:
    monitored, without = (_files(layers, steps, callback) for callback in (BNStatsMonitor(), Callback()))
    figures, rows, table, run, pictures, of_pictures, tables, of_tables = (
        a - b for a, b in zip(monitored, without, strict=True)
    )
    return (
        f"| {layers} | {figures} | {rows} | {table / 1024:.1f} | {run / 1024:.1f} "
        f"| {pictures}, {of_pictures / 1024:.0f} KiB | {tables}, {of_tables / 1024:.0f} KiB |"
    )


def _files(layers: int, steps: int, callback: Callback) -> list[int]:
    """Columns and rows of metrics.csv; bytes of it and of the W&B file; number and bytes of figures and of tables."""
    torch.manual_seed(0)
    module = Classifier(nn.Sequential(*[nn.BatchNorm1d(10) for _ in range(layers)]))
    with TemporaryDirectory() as folder:
        with _wandb_logger(folder) as logger:
            _fit(module, torch.randn(8, 8, 10), [callback], [logger, CSVLogger(folder, "csv", "")], steps)
        (metrics,) = Path(folder).rglob("metrics.csv")
        with metrics.open() as file:
            head, *rows = csv.reader(file)
        patterns = ("metrics.csv", "*.wandb", "files/media/**/*.png", "files/media/**/*.table.json")
        table, run, pictures, tables = ([file.stat().st_size for file in Path(folder).rglob(p)] for p in patterns)
    return [len(head), len(rows), sum(table), sum(run), len(pictures), sum(pictures), len(tables), sum(tables)]


def _fit(
    module: LightningModule, inputs: Tensor, callbacks: list[Callback], loggers: list[Logger], steps: int = -1
) -> Trainer:
    trainer = Trainer(
        accelerator=inputs.device.type,
        devices=1,
        max_epochs=-1,
        max_steps=steps,
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    labels = torch.randint(10, inputs.shape[:2], device=inputs.device)
    trainer.fit(module, cycle(list(zip(inputs, labels, strict=True))))
    return trainer


@contextmanager
def _wandb_logger(folder: str) -> Iterator[WandbLogger]:
    """Opens an offline run that writes only to `folder`, and finishes it, so that all files are complete."""
    places = {f"WANDB_{kind}_DIR": folder for kind in ("ARTIFACT", "CACHE", "CONFIG", "DATA")}
    quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    with patch.dict(os.environ, {"WANDB_MODE": "offline", **places}):
        try:
            yield WandbLogger(save_dir=folder, settings=quiet)
        finally:
            wandb.finish()
            wandb.teardown()


def _verdict(rows: Sequence[Row], name: str) -> str:
    chosen = [row for row in rows if row.name == name]
    missed = [row for row in chosen if row.missed()]
    worst = max(row.hooks.median for row in chosen)
    verdict = f"- Under {UNDER[name]:.0f} % in its hooks, {name}: {len(chosen) - len(missed)} of {len(chosen)}"
    return f"{verdict}; at most {worst:.3f} %."
