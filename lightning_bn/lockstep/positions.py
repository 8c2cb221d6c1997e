"""Comparison of ranks that run micro-batches in lockstep: all are at one call of a layer, or raise together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any

import torch

from lightning_bn.core.ranks import AnotherRankFailedError, get_world_size, max_over_ranks
from lightning_bn.lockstep.scheduler import LockstepError
from lightning_bn.lockstep.trial import ADVICE


class RankStatus(IntEnum):
    """Encodes the position of a rank that is at no layer; layers have the numbers from 0 on."""

    ABSENT = -1
    FINISHED = 1_000_000
    DIVERGED = 1_000_001
    FAILED = 1_000_002


class RankPositions:
    """Compares the positions of all ranks; an untracked call of a layer has the number ``len(names)`` higher."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names, self._device, self._is_over = names, device, False

    @contextmanager
    def synchronized_errors(self) -> Iterator[None]:
        """Finish on all ranks, or raise on all."""
        self._is_over = False
        try:
            yield
        except BaseException as error:
            if not self._is_over:
                with suppress(RuntimeError):
                    diverged = isinstance(error, LockstepError)
                    self.all_reduce(RankStatus.DIVERGED if diverged else RankStatus.FAILED)
            raise
        if not self._is_over:
            self.all_reduce(RankStatus.FINISHED)

    def all_reduce(self, position: int) -> int:
        """Return the position of all ranks with micro-batches; raise if positions differ, or a rank has failed."""
        lowest = -RankStatus.FAILED if position == RankStatus.ABSENT else -position
        last, minus_first = max_over_ranks([position, lowest], self._device)
        self._is_over = last >= RankStatus.FINISHED or last != -minus_first
        if last == RankStatus.FAILED:
            raise AnotherRankFailedError
        if last == RankStatus.DIVERGED:
            raise LockstepError("Micro-batches of another rank cannot run in lockstep; its error says why.")
        if last != -minus_first:
            names = [
                "their end" if n >= RankStatus.FINISHED else self._names[n % len(self._names)]
                for n in (-minus_first, last)
            ]
            raise LockstepError(
                f"Ranks diverge: micro-batches are at {names[0]} on one and at {names[1]} on another. {ADVICE}"
            )
        return last


@contextmanager
def drain_on_error(micro_batches: Iterable[Any]) -> Iterator[None]:
    """Fetch the rest on an error, because fetching is a collective that the other ranks still enter."""
    try:
        yield
    except Exception:
        if get_world_size() > 1:
            for _ in micro_batches:
                pass
        raise
