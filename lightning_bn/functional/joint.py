"""Joint batches: consecutive batches that a pass normalizes together, as many as needed and as memory allows."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator

from lightning_bn.core.micro_batches import MISSING, MicroBatch
from lightning_bn.core.ranks import get_rank
from lightning_bn.lockstep.pooled import PooledForward
from lightning_bn.lockstep.trial import ModelProfile

_MEMORY_SHARE = 0.5
"""Share of the free memory that joint batches may take."""


class JointBatches:
    """Runs groups of batches jointly.

    Args:
        pooled: Runs the micro-batches of a group.
        profile: Facts about the model, the warnings that were given among them.
        target: Samples of all ranks in a group.
        fits_memory: Take smaller groups, with a warning, rather than more than half of the free memory.
        advance: Advances the progress display by a number of samples.
    """

    def __init__(
        self,
        pooled: PooledForward,
        profile: ModelProfile,
        target: float,
        fits_memory: bool,
        advance: Callable[[int], None],
    ) -> None:
        self.pooled, self._profile, self._target = pooled, profile, target
        self._fits_memory, self._advance = fits_memory, advance

    def run(self, first: MicroBatch, steps: Iterator[MicroBatch]) -> list[MicroBatch]:
        """Run a group that begins with ``first``; returns it, or nothing if memory suffices only for one batch."""
        max_batches: float = self._target  # which have a sample each
        if self._fits_memory:
            max_batches = self.pooled.max_batches(first, _MEMORY_SHARE)
            if first.global_size * max_batches < self._target:
                self._warn(first, int(max_batches))
        if max_batches == 1:
            return []
        group = _BatchGroup(itertools.chain([first], steps), self._target, max_batches, self._advance)
        self.pooled.run(group, group.progress)
        return group.batches

    def _warn(self, first: MicroBatch, max_batches: int) -> None:
        needed = self._target / first.global_size * self.pooled.memory(first)
        warn_once(
            self._profile,
            "memory",
            f"Population statistics are estimated with normalization batches of {max_batches * first.global_size} "
            f"samples, not of {self._target:.0f}: those would keep about {needed / 1e9:.1f} GB alive on each rank, "
            f"more than half of the {self.pooled.free() / 1e9:.1f} GB that are free. Small ones accumulate error in "
            "depth (paper, Table 2): pass memory_limit= to move the rest to disk, or "
            "normalization_batch_size='loader' to accept that.",
        )


class _BatchGroup:
    """Steps that are normalized jointly: until they hold ``target`` samples, or there are ``max_batches``.

    Attributes:
        batches: Those fetched so far.
    """

    def __init__(
        self, steps: Iterator[MicroBatch], target: float, max_batches: float, advance: Callable[[int], None]
    ) -> None:
        self._steps, self._target, self._max_batches, self._advance = steps, target, max_batches, advance
        self.batches: list[MicroBatch] = []
        self._shown = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        while sum(m.global_size for m in self.batches) < self._target and len(self.batches) < self._max_batches:
            micro_batch = next(self._steps, None)
            if micro_batch is None:
                return
            self.batches.append(micro_batch)
            if micro_batch.batch is not MISSING:
                yield micro_batch

    def progress(self, share: float) -> None:
        """Advance the progress display to the share of the work that is done."""
        done = int(share * sum(m.global_size for m in self.batches))
        self._advance(done - self._shown)
        self._shown = done


def warn_once(profile: ModelProfile, subject: str, message: str) -> None:
    """Warn, on the first rank, unless an earlier pass has warned of the same subject."""
    if subject not in profile.warned and get_rank() == 0:
        warnings.warn(message, stacklevel=3)
    profile.warned.add(subject)
