"""Measures what BatchLeakageMonitor adds to an epoch: copies, the pass over kept batches, the test of all layers."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.monitor import Classifier
from benchmarks.timing import Spread
from lightning_bn import BatchLeakageMonitor

TITLE = "What BatchLeakageMonitor costs"
CLAIM = (
    "At its defaults it adds at most 1 % to an epoch of ResNet-18 over 50,000 images of 32 px: one forward without "
    "gradients over num_samples samples, and the test."
)
BATCHES, SAMPLES, PIXELS, EPOCHS, IMAGES = 128, 32, 32, 3, 50_000


class Timed(Callback):
    """Measures the seconds of each epoch, and of the monitor's hooks in it."""

    def __init__(self, monitor: BatchLeakageMonitor) -> None:
        self.monitor = monitor
        self.whole: list[float] = []
        self.copies: list[float] = []
        self.tests: list[float] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self._started = time.perf_counter()
        self._copied = 0.0
        self.monitor.on_train_epoch_start(*args)

    def on_train_batch_start(self, *args: Any) -> None:
        started = time.perf_counter()
        self.monitor.on_train_batch_start(*args)
        self._copied += time.perf_counter() - started

    def on_train_epoch_end(self, *args: Any) -> None:
        trained = time.perf_counter() - self._started
        started = time.perf_counter()
        self.monitor.on_train_epoch_end(*args)
        self.whole.append(trained - self._copied)
        self.copies.append(self._copied)
        self.tests.append(time.perf_counter() - started)


def report(device: str, quick: bool) -> str:
    """Measures on a device; returns table and method in Markdown."""
    torch.set_num_threads(2)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lines = [
        f"| network, batch | tested | copies, % of the epoch | pass and test, % of an epoch of {IMAGES:,} | s |",
        "|---|---|---|---|---|",
    ]
    epoch = SAMPLES * (8 if quick else BATCHES)
    for tested in (epoch // 4, epoch):  # the latter is the default
        timed = _fit(Classifier(torchvision.models.resnet18(weights=None)), tested, epoch, device)
        copies, tests = (
            Spread.of([scale * a / b for a, b in zip(part[1:], timed.whole[1:], strict=True)])
            for part, scale in ((timed.copies, 100.0), (timed.tests, 100 * epoch / IMAGES))
        )
        lines.append(
            f"| ResNet-18, {SAMPLES} of {PIXELS} px | {tested} | {copies} "
            f"| {tests}{' **missed**' if tests.median > 1 else ''} "
            f"| {Spread.of(timed.tests[1:]).median:.1f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"**Method.** Random images and weights, SGD at rate 0, {EPOCHS} epochs of {epoch} samples, of which the "
            "first is not counted. Time in the monitor's hooks, relative to the rest of the same epoch; median and "
            f"quartiles. That of pass and test is multiplied by {epoch} / {IMAGES}. The data have no leakage, so the "
            "test stops early, as in most epochs.",
        ]
    )


def _fit(module: LightningModule, tested: int, epoch: int, device: str) -> Timed:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(epoch, 3, PIXELS, PIXELS), torch.randint(10, (epoch,)))
    timed = Timed(BatchLeakageMonitor(tested, alpha=1e-9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            max_epochs=EPOCHS,
            callbacks=[timed],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, SAMPLES, shuffle=True))
    return timed
