"""Single runs of the first micro-batch: they measure its memory, and check if joint runs change its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_bn.core.batch_copy import copied
from lightning_bn.core.micro_batches import MISSING, MicroBatch
from lightning_bn.core.moments import Moments
from lightning_bn.core.rng import preserve_rng_state, random_streams, save_rng_state
from lightning_bn.layers.batch_mode import BatchMode, SyncStatistics
from lightning_bn.layers.modes import LayerFlags
from lightning_bn.lockstep.offload import AllocationTracker
from lightning_bn.lockstep.scheduler import LockstepError

ADVICE = "Leave the layers in question out by layers=, or pass normalization_batch_size='loader'."
_MAX_MEAN_SHIFT = 1e-2  # in sigma, between a joint and a single run: the rounding of 16-bit types


class MemoryEstimate(NamedTuple):
    """Holds the most bytes that a micro-batch keeps alive at a layer, its samples, and its number of layer calls."""

    num_bytes: int
    samples: int
    calls: int


@dataclass
class ModelProfile:
    """Holds facts about a model from its first micro-batch, valid for later passes.

    Attributes:
        memory: Memory of a micro-batch; None until one was run.
        is_independent: Whether a check has found that micro-batches do not influence each other.
        warned: Subjects of the warnings so far; each is given once.
    """

    memory: MemoryEstimate | None = None
    is_independent: bool = False
    warned: set[str] = field(default_factory=set)


class LayerCall(NamedTuple):
    """Records a layer's call in a joint run: the first micro-batch's moments, and the statistics to normalize with."""

    name: str
    moments: Moments
    mean: Tensor
    var: Tensor


class BatchSnapshot:
    """Keeps a copy of a micro-batch, since running it may change it, and the random states at its start."""

    def __init__(self, batch: Any) -> None:
        self.batch = copied(batch)
        self._restore_rng = save_rng_state(cuda=False)  # on CUDA, each micro-batch has its own stream

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """Draw the random numbers that the micro-batch draws in lockstep."""
        with preserve_rng_state(cuda=False):
            self._restore_rng()
            with next(random_streams()).activate():
                yield


class Trial:
    """Runs the first micro-batch alone."""

    def __init__(self, mode: BatchMode, flags: LayerFlags, run: Callable[[Any], Any], profile: ModelProfile) -> None:
        self._mode, self._flags, self._run, self.profile = mode, flags, run, profile

    def memory(self, micro_batch: MicroBatch) -> MemoryEstimate:
        """Estimate the memory of a micro-batch; the first one is run for that."""
        if micro_batch.batch is MISSING or not micro_batch.samples:
            return MemoryEstimate(0, 1, 0)
        if self.profile.memory is None:
            tracker, peaks = AllocationTracker(), [0]

            def exchange(name: str, moments: Moments, is_tracked: bool) -> tuple[Tensor, Tensor]:
                peaks.append(tracker.num_bytes)
                return moments.mean, moments.var

            snapshot = BatchSnapshot(micro_batch.batch)
            with self.exchanging(exchange), tracker:  # the copy of the batch is allocated within, and counts
                self._run_single(snapshot)
            self.profile.memory = MemoryEstimate(max(peaks), micro_batch.samples, len(peaks) - 1)
        return self.profile.memory

    def verify(self, snapshot: BatchSnapshot, calls: Sequence[LayerCall]) -> None:
        """Run the first micro-batch with the joint run's statistics; raise a LockstepError if layers' inputs differ."""
        remaining = iter(calls)

        def exchange(name: str, moments: Moments, is_tracked: bool) -> tuple[Tensor, Tensor]:
            call = next(remaining, None)
            if call is None or call.name != name or _differ(call, moments):
                raise LockstepError(
                    f"Layer {name!r} got a different input when batches were run jointly: the model stores state "
                    f"between layers (in an attribute or a hook's list), or draws its own random numbers. {ADVICE}"
                )
            return call.mean, call.var

        with self.exchanging(exchange):
            self._run_single(snapshot)

    def _run_single(self, snapshot: BatchSnapshot) -> None:
        self._flags.set(self._flags.initial)
        with snapshot.random_numbers():
            self._run(copied(snapshot.batch))

    @contextmanager
    def exchanging(self, exchange: SyncStatistics) -> Iterator[None]:
        """Make the layers normalize with the statistics that ``exchange`` returns."""
        before, self._mode.exchange = self._mode.exchange, exchange
        try:
            yield
        finally:
            self._mode.exchange = before


def _differ(call: LayerCall, moments: Moments) -> bool:
    if call.moments.count != moments.count:
        return True
    shift = (moments.mean - call.moments.mean).abs() / (call.var + 1e-5).sqrt()
    return bool(shift.amax() > _MAX_MEAN_SHIFT)  # False for NaN: non-finite values have their own check
