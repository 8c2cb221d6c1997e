"""Paired timing: contestants take turns within every round, so that other load slows all of them.

Ratios are taken *within* a round. Their median over rounds and the quartiles are reported.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def take_turns(contestants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Measures the seconds of each contestant in each round; the order rotates, after an unmeasured round."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        first = number % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            wait_for(device)
            started = time.perf_counter()
            contestants[name]()
            wait_for(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> Spread:
    """Time of ``of`` divided by that of ``to``, round by round."""
    return Spread.of([a / b for a, b in zip(seconds[of], seconds[to], strict=True)])


def wait_for(device: str) -> None:
    """Waits until a GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
