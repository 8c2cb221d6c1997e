"""Single runs of the first micro-batch: they measure its memory, and check if joint runs change its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
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


class JointCall(NamedTuple):
    """Records a layer's call in a joint run.

    ``facts`` are the pooled count and, for each micro-batch, whether its values are finite. They are read after the
    run, all at once, because each reading waits for the device.
    """

    name: str
    is_tracked: bool
    first: Moments  # of the first micro-batch
    pooled: Moments
    facts: Tensor

    @classmethod
    def of(cls, name: str, is_tracked: bool, first: Moments, pooled: Moments, finite: Tensor) -> JointCall:
        count = pooled.count.flatten()[:1].to(finite.device, non_blocking=True)
        return cls(name, is_tracked, first, pooled, torch.cat([count, finite.to(count)]))


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

    def verify(self, snapshot: BatchSnapshot, calls: Sequence[JointCall]) -> None:
        """Run the first micro-batch with the joint run's statistics; raise a LockstepError if layers' inputs differ."""
        remaining = iter(calls)
        differs: list[tuple[str, Tensor]] = []

        def exchange(name: str, moments: Moments, is_tracked: bool) -> tuple[Tensor, Tensor]:
            call = next(remaining, None)
            if call is None or call.name != name:
                raise _influenced(name)
            differs.append((name, _differ(call, moments)))
            return call.pooled.mean, call.pooled.var

        with self.exchanging(exchange):
            self._run_single(snapshot)
        found = torch.stack([d for _, d in differs]).tolist() if differs else []
        for (name, _), differ in zip(differs, found, strict=True):
            if differ:
                raise _influenced(name)

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


def _differ(call: JointCall, moments: Moments) -> Tensor:
    shift = (moments.mean - call.first.mean).abs() / (call.pooled.var + 1e-5).sqrt()
    # False for NaN: non-finite values have their own check
    return (shift.amax() > _MAX_MEAN_SHIFT) | (call.first.count != moments.count)


def _influenced(layer: str) -> LockstepError:
    return LockstepError(
        f"Layer {layer!r} got a different input when batches were run jointly: the model stores state between layers "
        f"(in an attribute or a hook's list), or draws its own random numbers. {ADVICE}"
    )
