"""Claim: exchanging rows moves fewer bytes than gathering all rows on every rank, as the paper's code does.

The reference is detectron2's (projects/Rethinking-BatchNorm, `mask_rcnn_BNhead_shuffle.py`): rows are padded to the
largest rank's number and gathered on all ranks, and each rank takes its share. Outputs are gathered in the same way.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fvcore.nn.distributed import differentiable_all_gather
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from benchmarks.timing import Spread, ratio, take_turns
from lightning_bn import exchange_rows, restore_rows

TITLE = "RoI shuffle moves only the rows that change ranks"
CLAIM = (
    "In forward and backward of a shuffled box head, each of k ranks receives at most 1 / k of the bytes that it "
    "receives in the all-gather of the reference implementation."
)
RANKS = (2, 4, 8)
FEATURES, OUTPUTS = (256, 7, 7), 1024
UNEVEN = (128, 40, 96, 0, 128, 64, 16, 112)
"""Rows of each rank, for up to eight ranks."""


@dataclass(frozen=True)
class Row:
    """The measurements for one number of ranks."""

    ranks: int
    rows: str
    ours: float
    reference: float
    time: Spread

    @property
    def share(self) -> float:
        return self.ours / self.reference

    def __str__(self) -> str:
        missed = " **missed**" if self.share > 1 / self.ranks else ""
        numbers = f"{self.ours:.1f} | {self.reference:.1f} | {self.share:.3f}{missed} | {self.time}"
        return f"| {self.ranks} | {self.rows} | {numbers} |"


def report(device: str, quick: bool) -> str:
    """Measures on the CPU; returns table and method in Markdown."""
    if device == "cuda":
        return "Not measured: one GPU is one rank, and there is no other to exchange rows with."
    rows = []
    for ranks, even in product(RANKS[:1] if quick else RANKS, (True, False)):
        counts = [64] * ranks if even else list(UNEVEN[:ranks])
        rows.append(_measure(counts, rounds=2 if quick else 3))
        print(rows[-1], flush=True)
    return "\n".join(
        [
            "| ranks | rows of each | MiB per rank, exchanged | MiB per rank, gathered | exchanged / gathered | time, "
            "exchanged / gathered |",
            "|---|---|---|---|---|---|",
            *map(str, rows),
            "",
            f"**Method.** gloo processes of one thread each on one machine. Rows of {' x '.join(map(str, FEATURES))} "
            f"float32 go into a linear layer of {OUTPUTS} outputs, which are restored; forward and backward. The "
            "reference is detectron2's, with fvcore's differentiable all-gather. Bytes received by a rank, mean over "
            "ranks: in an all-to-all those from other ranks; in an all-gather the padded rows of all other ranks; in "
            "an "
            "all-reduce of n bytes 2 (k - 1) / k n, which is the minimum. In each round both run one after the "
            "other, in "
            "rotating order; the time is the ratio within a round, on rank 0: median with quartiles. Processes share "
            "the "
            "cores.",
        ]
    )


def _measure(counts: list[int], rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        # Fork, because eight ranks with imports of their own would take a gigabyte each.
        start_processes(_rank, (counts, rounds, folder), nprocs=len(counts), start_method="fork")
        received, seconds = torch.load(Path(folder) / "measured")
    ours, reference = (2.0**-20 * received[name] / len(counts) for name in ("exchanged", "gathered"))
    rows = f"{counts[0]}" if len(set(counts)) == 1 else ", ".join(map(str, counts))
    return Row(len(counts), rows, ours, reference, ratio(seconds, "exchanged", "gathered"))


def _rank(rank: int, counts: list[int], rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=len(counts))
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(FEATURES), OUTPUTS))
    rows = torch.randn(counts[rank], *FEATURES, requires_grad=True)
    generator = torch.Generator().manual_seed(0)

    def exchanged() -> None:
        moved, exchange = exchange_rows(rows, generator=generator)
        restore_rows(head(moved), exchange=exchange).sum().backward()

    def gathered() -> None:
        moved, inverse = _shuffled(rows)
        torch.cat(_all_rows(head(moved)))[inverse].sum().backward()

    contestants = {"exchanged": exchanged, "gathered": gathered}
    received = {}
    for name, contestant in contestants.items():
        with _bytes_received() as counted:
            contestant()
        total = torch.tensor(counted).sum()
        dist.all_reduce(total)
        received[name] = int(total)
    seconds = take_turns(contestants, rounds, "cpu")
    if rank == 0:
        torch.save((received, seconds), Path(folder) / "measured")
    dist.barrier()
    dist.destroy_process_group()


def _all_rows(x: Tensor) -> list[Tensor]:
    """Gathers the rows of every rank on every rank, as detectron2 does."""
    size = torch.tensor([len(x)])
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    padded = x.new_zeros(max(map(int, sizes)), *x.shape[1:])
    padded[: len(x)] = x
    return [rows[: int(size)] for size, rows in zip(sizes, differentiable_all_gather(padded), strict=True)]


def _shuffled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns this rank's share of all shuffled rows, and the places of its original rows in the shuffled order."""
    parts = _all_rows(x)
    total, before = sum(map(len, parts)), sum(map(len, parts[: dist.get_rank()]))
    order = torch.randperm(total)
    dist.broadcast(order, 0)
    shares = order.split(math.ceil(total / dist.get_world_size()))
    share = shares[dist.get_rank()] if len(shares) > dist.get_rank() else order[:0]
    return torch.cat(parts)[share], order.argsort()[before : before + len(x)]


@contextmanager
def _bytes_received() -> Iterator[list[float]]:
    """Counts the bytes that this rank receives in collectives."""
    ranks, counted = dist.get_world_size(), list[float]()
    kept = dist.all_to_all_single, dist.all_gather, dist.all_reduce, dist.broadcast

    def bytes_of(x: Tensor) -> int:
        return x.numel() * x.element_size()

    def all_to_all_single(output: Tensor, input: Tensor, taken: list[int], *args: Any, **kwargs: Any) -> Any:
        counted.append(bytes_of(output) * (1 - taken[dist.get_rank()] / max(sum(taken), 1)))
        return kept[0](output, input, taken, *args, **kwargs)

    def all_gather(outputs: list[Tensor], own: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(bytes_of(own) * (ranks - 1))
        return kept[1](outputs, own, *args, **kwargs)

    def all_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(2 * (ranks - 1) / ranks * bytes_of(x))
        return kept[2](x, *args, **kwargs)

    def broadcast(x: Tensor, source: int, *args: Any, **kwargs: Any) -> Any:
        counted.append(bytes_of(x) * (dist.get_rank() != source))
        return kept[3](x, source, *args, **kwargs)

    try:
        for function in (all_to_all_single, all_gather, all_reduce, broadcast):
            setattr(dist, function.__name__, function)
        yield counted
    finally:
        for original in kept:
            setattr(dist, original.__name__, original)
