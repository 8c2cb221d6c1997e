"""Normalization batches larger than the batches: micro-batches in lockstep, pooled over all ranks.

Every layer normalizes all micro-batches with the pooled moments of their inputs. That equals one tensor with all
samples, but micro-batches may have any size and structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lightning_bn.core.batch_copy import copied
from lightning_bn.core.micro_batches import MicroBatch
from lightning_bn.core.moments import Moments
from lightning_bn.core.ranks import get_rank, get_world_size, max_over_ranks, merge_over_ranks, sum_over_ranks
from lightning_bn.layers.batch_mode import BatchMode, SyncStatistics
from lightning_bn.layers.modes import LayerFlags
from lightning_bn.lockstep.offload import AllocationTracker, OffloadManager, free_memory
from lightning_bn.lockstep.positions import RankPositions, RankStatus, drain_on_error
from lightning_bn.lockstep.scheduler import Lockstep, LockstepError
from lightning_bn.lockstep.trial import ADVICE, BatchSnapshot, JointCall, ModelProfile, Trial


class NotEnoughMemoryError(MemoryError):
    """Signals, before a pass takes it, that its micro-batches need more memory than is free."""


class PooledForward:
    """Runs micro-batches as one normalization batch.

    The first one also runs alone: before, to estimate its memory, and afterwards, to check that the others do not
    change it. Above ``memory_limit`` bytes per rank, waiting ones are offloaded; with None, that is an error.

    Attributes:
        left_out: This rank's micro-batches that gave a layer non-finite values, and the layer.
    """

    def __init__(
        self,
        mode: BatchMode,
        flags: LayerFlags,
        run: Callable[[Any], Any],
        memory_limit: int | None,
        profile: ModelProfile,
    ) -> None:
        self._accumulator, self._flags, self._run = mode.accumulator, flags, run
        self._trial, self._profile = Trial(mode, flags, run, profile), profile
        self._device = self._accumulator.device
        self._names = list(self._accumulator.channels)
        self._offload = None if memory_limit is None else OffloadManager(memory_limit)
        self._snapshot: BatchSnapshot | None = None
        self._positions = RankPositions(self._names, self._device)
        self._calls: list[JointCall] = []
        self._is_single = False
        self.left_out: list[tuple[MicroBatch, str]] = []

    @property
    def spilled(self) -> int:
        return self._offload.spilled if self._offload else 0

    def max_batches(self, micro_batch: MicroBatch, share: float) -> int:
        """Return how many such micro-batches fit into a share of the free memory, on every rank."""
        with self._positions.synchronized_errors():
            fitting = int(share * self.free() // max(self.memory(micro_batch), 1))
        (fewest,) = max_over_ranks([-fitting], self._device)
        return max(-fewest, 1)

    def memory(self, micro_batch: MicroBatch) -> int:
        """Estimate the bytes that a micro-batch keeps alive."""
        return self._trial.memory(micro_batch).num_bytes

    def free(self) -> int:
        """Return the bytes of memory that this rank may still take."""
        free = free_memory(self._device)
        return free if self._device.type == "cuda" else free // get_world_size()  # ranks share the host

    def run(
        self, micro_batches: Iterable[MicroBatch], progress: Callable[[float], None], is_single: bool = False
    ) -> None:
        """Run micro-batches jointly, and accumulate the pooled statistics of every call of a layer.

        Every rank needs equally many, or none if it never had a batch. Iterating twice continues where the first time
        ended. ``progress`` gets the share of the work that is done. A single micro-batch needs no runs alone.
        """
        running: list[MicroBatch] = []
        self._is_single = is_single
        self._run_jointly(micro_batches, running, progress)
        counts, bad = self._check_calls(running)
        while bad is not None:
            left, running = [m for m in running if m.number not in bad], []
            some_left, *_ = sum_over_ranks([sum(not m.is_padding for m in left)], self._device)
            if not some_left:
                return
            self._run_jointly(left, running, progress)
            counts, bad = self._check_calls(running)
        for call, count in zip(self._calls, counts, strict=True):
            if call.is_tracked and count and get_rank() == 0:  # the pooled ones of all ranks count once
                mean, var = self._accumulator.slot(call.name, count)
                mean.copy_(call.pooled.mean)
                var.copy_(call.pooled.m2 / max(count - 1, 1))
        if not self._profile.is_independent and not self._is_single:
            with self._positions.synchronized_errors():
                if self._snapshot:
                    self._trial.verify(self._snapshot, self._calls)
            self._profile.is_independent, self._snapshot = True, None
        progress(1.0)

    def _run_jointly(
        self, micro_batches: Iterable[MicroBatch], running: list[MicroBatch], progress: Callable[[float], None]
    ) -> None:
        # appends to `running`
        self._calls, self._snapshot = [], None

        def answer(name: str, inputs: list[tuple[Moments, bool]]) -> Sequence[tuple[Tensor, Tensor]]:
            pooled = self._pool(name, inputs, running)
            if self._profile.memory is not None:
                done = len(self._calls)
                progress(min(done / max(self._profile.memory.calls, done), 1.0))
            return [(pooled.mean, pooled.var)] * len(running)

        lockstep = Lockstep[str, tuple[Moments, bool], tuple[Tensor, Tensor]](answer, True, ADVICE)
        with (
            self._positions.synchronized_errors(),
            drain_on_error(micro_batches),
            self._trial.exchanging(self._exchange_of(lockstep)),
        ):
            lockstep.run(self._functions(micro_batches, running))
            if not running:
                self._join_collectives()

    def _check_calls(self, running: Sequence[MicroBatch]) -> tuple[list[int], set[int] | None]:
        # Returns the counts of all calls, and the numbers of micro-batches with non-finite values; None if all ranks'
        # are finite. Only the first such layer of any rank decides: later ones mix all micro-batches.
        facts = torch.stack([call.facts for call in self._calls]).tolist() if self._calls else []
        first = next((i for i, (_, *finite) in enumerate(facts) if not all(finite)), RankStatus.FINISHED)
        (minus_first,) = max_over_ranks([-first], self._device)
        counts = [int(count) for count, *_ in facts]
        if minus_first == -RankStatus.FINISHED:
            return counts, None
        if first != -minus_first:
            return counts, set()
        bad = [m for m, is_finite in zip(running, facts[first][1:], strict=True) if not is_finite]
        self.left_out += [(m, self._calls[first].name) for m in bad]
        return counts, {m.number for m in bad}

    def _functions(self, micro_batches: Iterable[MicroBatch], running: list[MicroBatch]) -> Iterator[Callable[[], Any]]:
        free: int | None = None
        for micro_batch in micro_batches:
            if self._is_single:
                running.append(micro_batch)
                yield self._function(micro_batch.batch)
                continue
            memory = self._trial.memory(micro_batch)
            free = self.free() if free is None else free
            if not running and not self._profile.is_independent:
                self._snapshot = BatchSnapshot(micro_batch.batch)
            running.append(micro_batch)
            samples = sum(m.samples for m in running)
            expected = memory.num_bytes * samples / memory.samples
            if self._offload is None and expected > free:
                raise NotEnoughMemoryError(
                    f"{len(running)} micro-batches of {samples} samples (on this rank) will keep about {expected:,.0f} "
                    f"bytes alive at the widest BatchNorm layer, and {free:,} are free. Pass a smaller "
                    "normalization_batch_size, or memory_limit=, the bytes above which waiting ones are put to disk."
                )
            yield self._function(micro_batch.batch)

    def _function(self, batch: Any) -> Callable[[], Any]:
        def function() -> None:
            self._flags.set(self._flags.initial)
            if self._offload is None:
                self._run(copied(batch))  # a step may change it, and it may run again
            else:
                with self._offload.keep_track() as tracker:
                    _TRACKER.set(tracker)
                    self._run(copied(batch))

        return function

    def _exchange_of(self, lockstep: Lockstep[str, tuple[Moments, bool], tuple[Tensor, Tensor]]) -> SyncStatistics:
        offload = self._offload

        def exchange(name: str, moments: Moments, is_tracked: bool) -> tuple[Tensor, Tensor]:
            flags = self._flags.now()
            tracker = _TRACKER.get(None) if offload else None  # None as well in another thread
            tensors = (moments.mean, moments.m2)
            with offload.waiting(tracker, tensors) if offload and tracker else nullcontext():
                statistics = lockstep.exchange(name, (moments, is_tracked))
            self._flags.set(flags)  # other forwards set theirs meanwhile
            return statistics

        return exchange

    def _pool(self, name: str, inputs: Sequence[tuple[Moments, bool]], running: Sequence[MicroBatch]) -> Moments:
        is_tracked = {tracked for _, tracked in inputs}
        if len(is_tracked) > 1:
            raise LockstepError(f"Layer {name!r} tracks some micro-batches at a call, and others not. {ADVICE}")
        tracked = is_tracked.pop()
        self._positions.all_reduce(self._names.index(name) + (0 if tracked else len(self._names)))
        moments = [_without_values(m) if batch.is_padding else m for (m, _), batch in zip(inputs, running, strict=True)]
        finite = torch.stack([m.mean + m.m2 for m in moments]).isfinite().all(1)
        pooled = merge_over_ranks(Moments.merge(moments))
        self._calls.append(JointCall.of(name, tracked, inputs[0][0], pooled, finite))
        return pooled

    def _join_collectives(self) -> None:  # on a rank without micro-batches
        while (position := self._positions.all_reduce(RankStatus.ABSENT)) < 2 * len(self._names):
            name = self._names[position % len(self._names)]
            nothing = Moments.empty(self._accumulator.channels[name], self._accumulator.device)
            pooled = merge_over_ranks(nothing)
            self._calls.append(JointCall.of(name, position < len(self._names), nothing, pooled, nothing.mean[:0]))


_TRACKER: ContextVar[AllocationTracker] = ContextVar("tracker")


def _without_values(moments: Moments) -> Moments:
    return Moments(*(torch.zeros_like(v) for v in (moments.count, moments.mean, moments.m2)))
