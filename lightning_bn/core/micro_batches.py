"""Batches of all ranks, step by step, so that collectives inside the model match.

Every rank runs as many forwards as the one with the most batches. A rank without a batch left repeats its last one, and
does not measure it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.ranks import AnotherRankFailedError, get_world_size, sum_over_ranks

MISSING = object()
"""The batch of a rank that never had one."""


@dataclass(frozen=True)
class MicroBatch:
    """Holds a rank's batch in one step of all ranks.

    Attributes:
        number: Its place among this rank's batches, from 0.
        is_padding: Whether it only runs to match the other ranks' collectives.
        samples: Samples on this rank; ``global_size`` is the sum over ranks.
        ranks: Number of ranks whose batch is no padding.
        is_small: Whether one of these holds fewer samples than `SynchronizedBatches.min_size`.
    """

    batch: Any
    number: int
    is_padding: bool
    samples: int
    global_size: int
    ranks: int
    is_small: bool


@dataclass
class SynchronizedBatches:
    """Yields a `MicroBatch` in every step in which a rank has samples; if one rank fails, all raise.

    Attributes:
        batches: This rank's batches.
        num_samples: Samples of all ranks after which it stops; None takes all batches.
        every_rank: Whether every rank must have a batch, because SyncBatchNorm layers wait for all ranks.
        min_size: Batches of fewer samples are small.
    """

    batches: Iterable[Any]
    num_samples: int | None
    batch_size_fn: BatchSizeFn
    device: torch.device
    every_rank: bool = False
    min_size: float = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        batches, samples, batch = iter(self.batches), 0, MISSING
        for number in itertools.count():
            is_enough = self.num_samples is not None and samples >= self.num_samples
            with self.failing_together():
                fetched = MISSING if is_enough else next(batches, MISSING)
                is_padding = fetched is MISSING
                size = 0 if is_padding else self.batch_size_fn(fetched)
            batch = batch if is_padding else fetched
            is_small = not is_padding and size < self.min_size
            # entered after the last batch as well: it may have failed on another rank
            ranks, global_size, small, failed = sum_over_ranks([not is_padding, size, is_small, False], self.device)
            if failed:
                raise AnotherRankFailedError
            if not ranks:
                return
            if not samples and ranks < get_world_size() and self.every_rank:
                raise ValueError(
                    f"Only {ranks} of {get_world_size()} ranks have a batch, and SyncBatchNorm layers wait for every "
                    "rank: give each rank at least one batch."
                )
            samples += global_size
            if global_size:
                yield MicroBatch(batch, number, is_padding, size, global_size, ranks, bool(small))

    def check_failures(self) -> None:
        """Raise `AnotherRankFailedError` if another rank has failed in its batch."""
        *_, failed = sum_over_ranks([False, 0, False, False], self.device)
        if failed:
            raise AnotherRankFailedError

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Inform the other ranks of an error, in the collective that they enter next."""
        try:
            yield
        except BaseException:
            if get_world_size() > 1:
                sum_over_ranks([False, 0, False, True], self.device)
            raise
