"""Joint batches: consecutive batches that a pass normalizes together, as many as needed and as memory allows."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightning_bn.core.micro_batches import MISSING, MicroBatch
from lightning_bn.core.ranks import get_rank
from lightning_bn.lockstep.pooled import PooledForward
from lightning_bn.lockstep.trial import ModelProfile

_MEMORY_SHARE = 0.5
"""Share of the free memory that joint batches may take."""


@dataclass(frozen=True)
class JointBatches:
    """Runs batches jointly, in groups of ``target`` samples of all ranks.

    With ``fits_memory`` it takes smaller groups, with a warning, rather than more than half of the free memory.
    """

    pooled: PooledForward
    profile: ModelProfile
    target: float
    fits_memory: bool
    advance: Callable[[int], None]  # the progress display, by a number of samples

    def run(self, first: MicroBatch, steps: Iterator[MicroBatch]) -> list[MicroBatch]:
        """Run a group that begins with ``first``; returns it, or nothing if memory suffices only for one batch."""
        max_batches: float = self.target  # which have a sample each
        if self.fits_memory:
            max_batches = self.pooled.max_batches(first, _MEMORY_SHARE)
            if first.global_size * max_batches < self.target:
                self._warn(first, int(max_batches))
        if max_batches == 1:
            return []
        start = [first] if self.fits_memory else [first, *itertools.islice(steps, 1)]
        is_single = not self.fits_memory and len(start) == 1  # on all ranks alike, because they fetch together
        group: list[MicroBatch] = []
        shown = 0

        def fetched() -> Iterator[MicroBatch]:
            for step in itertools.chain(start, steps):
                group.append(step)
                if step.batch is not MISSING:
                    yield step
                if sum(m.global_size for m in group) >= self.target or len(group) >= max_batches:
                    return

        def show(share: float) -> None:
            nonlocal shown
            done = int(share * sum(m.global_size for m in group))
            self.advance(done - shown)
            shown = done

        self.pooled.run(fetched(), show, is_single)
        return group

    def _warn(self, first: MicroBatch, max_batches: int) -> None:
        needed = self.target / first.global_size * self.pooled.memory(first)
        warn_once(
            self.profile,
            "memory",
            f"Population statistics are of normalization batches of {max_batches * first.global_size} samples, not of "
            f"{self.target:.0f}, which would take {needed / 1e9:.1f} GB on each rank, more than half of the "
            f"{self.pooled.free() / 1e9:.1f} GB that are free. Small ones accumulate error in depth (paper, Table 2): "
            "pass memory_limit= to move the rest to disk, or normalization_batch_size='loader' to accept that.",
        )


def warn_once(profile: ModelProfile, subject: str, message: str) -> None:
    """Warn, on the first rank, unless an earlier pass has warned of the same subject."""
    if subject not in profile.warned and get_rank() == 0:
        warnings.warn(message, stacklevel=3)
    profile.warned.add(subject)
