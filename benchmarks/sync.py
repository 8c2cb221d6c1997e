"""Claim: SyncBN takes as long as plain BatchNorm and the necessary exchanges.

Compared with (a) plain BatchNorm and (b) bare exchanges of the same bytes. torch's own SyncBatchNorm does not take CPU
tensors.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.multiprocessing.spawn import spawn

import lightning_bn as lbn
from benchmarks.timing import Spread, ratio, take_turns

TITLE = "The cost of SyncBN"
CLAIM = (
    "Forward and backward under `lightning_bn.sync_bn` take at most 1.10 times as long as under plain BatchNorm, "
    "together with bare exchanges of the bytes that SyncBN has to move; at most 1.30 times at 32 px."
)

NETWORKS = ("resnet18", "mobilenet_v2")
RANKS = 2


@dataclass(frozen=True)
class Shape:
    """The batch of each rank, and the number of rounds."""

    samples: int
    pixels: int
    rounds: int
    max_time: float

    def __str__(self) -> str:
        return f"{self.samples} of {self.pixels} px"


SHAPES = (Shape(8, 128, rounds=11, max_time=1.1), Shape(4, 32, rounds=31, max_time=1.3))
QUICK = (Shape(2, 32, rounds=2, max_time=1.3),)


@dataclass(frozen=True)
class Row:
    """One network and shape."""

    case: str
    to_plain: Spread
    to_sum: Spread
    max_time: float
    milliseconds: dict[str, float]

    @property
    def missed(self) -> bool:
        """Whether the printed median is above the target."""
        return round(self.to_sum.median, 3) > self.max_time

    def __str__(self) -> str:
        times = [f"{ms:.1f}" for ms in self.milliseconds.values()]
        target = f"{self.to_sum}{' **missed**' if self.missed else ''}"
        return f"| {' | '.join([self.case, str(self.to_plain), target, *times])} |"


def report(device: str, quick: bool) -> str:
    """Measures on the CPU; returns table and method in Markdown."""
    if device == "cuda":
        return "Not measured: one GPU is one rank, which has nothing to synchronize."
    rows = []
    for network, shape in product(NETWORKS, QUICK if quick else SHAPES):
        rows.append(_measure(network, shape))
        print(rows[-1], flush=True)
    met = sum(not row.missed for row in rows)
    return "\n".join(
        [
            "| network | batch of a rank | layers | KiB | synced / plain | synced / (plain + exchanges) "
            "| plain, ms | synced | exchanges |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(str, rows),
            "",
            f"- Within the claim: {met} of {len(rows)}.",
            "",
            f"**Method.** {RANKS} gloo processes of one thread each on one machine; torchvision networks with random "
            "weights on random images, float32, forward and backward without DDP. The exchanges are one all-gather "
            "(forward) and one all-reduce (backward) per layer; KiB is their input on a rank. In each round the "
            "three run "
            "one after the other, in rotating order; ratios are taken within a round, on rank 0. Medians over rounds, "
            "with quartiles in brackets; **missed** marks a median above the target.",
        ]
    )


def _measure(network: str, shape: Shape) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (network, shape, folder), nprocs=RANKS)
        channels, seconds = torch.load(Path(folder) / "seconds")
    seconds["sum"] = [a + b for a, b in zip(seconds["plain"], seconds["exchanges"], strict=True)]
    moved = sum(8 * 5 * c for c in channels) / 1024
    return Row(
        f"{network} | {shape} | {len(channels)} | {moved:.0f}",
        ratio(seconds, "synced", "plain"),
        ratio(seconds, "synced", "sum"),
        shape.max_time,
        {name: 1000 * Spread.of(seconds[name]).median for name in ("plain", "synced", "exchanges")},
    )


def _rank(rank: int, network: str, shape: Shape, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=RANKS)
    torch.manual_seed(rank)
    model = getattr(torchvision.models, network)(weights=None).train()
    images = torch.randn(shape.samples, 3, shape.pixels, shape.pixels)
    channels = [layer.num_features for layer in lbn.find_bn(model).values()]

    def synced() -> None:
        with lbn.sync_bn(model):
            _step(model, images)

    seconds = take_turns(
        {"plain": lambda: _step(model, images), "synced": synced, "exchanges": lambda: _exchanges(channels)},
        shape.rounds,
        "cpu",
    )
    if rank == 0:
        torch.save((channels, seconds), Path(folder) / "seconds")
    dist.barrier()
    dist.destroy_process_group()


def _step(model: nn.Module, images: torch.Tensor) -> None:
    model(images).sum().backward()


def _exchanges(channels: list[int]) -> None:
    for c in channels:
        statistics = torch.zeros(3, c, dtype=torch.float64)
        dist.all_gather([torch.empty_like(statistics) for _ in range(RANKS)], statistics)
    for c in reversed(channels):
        dist.all_reduce(torch.zeros(2, c, dtype=torch.float64))
