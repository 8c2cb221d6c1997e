"""Normalization batches larger than the batches there are: micro-batches in lockstep, pooled over all ranks.

At every BatchNorm layer each micro-batch brings the moments of its input, and all of them are normalized with the
pooled ones. That is what the layer would do with all samples in one tensor (B of Table 2), though no such tensor is
ever made: micro-batches may have any size and structure.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bn.core.batch_copy import copied
from lightning_bn.core.moments import Moments
from lightning_bn.core.population import Accumulator
from lightning_bn.core.ranks import (
    AnotherRankFailedError,
    get_rank,
    get_world_size,
    max_over_ranks,
    merge_over_ranks,
    sum_over_ranks,
)
from lightning_bn.layers.modes import LayerFlags
from lightning_bn.lockstep.in_lockstep import InLockstep, InputMoments, SyncStatistics
from lightning_bn.lockstep.offload import AllocationTracker, OffloadManager, free_memory
from lightning_bn.lockstep.scheduler import Lockstep, LockstepError
from lightning_bn.lockstep.thread_state import random_streams

MISSING = object()
"""The batch of a rank that never had one."""
_MAX_MEAN_SHIFT = 1e-2
"""Sigma by which what a micro-batch brings may differ between lockstep and alone: what 16-bit types may round."""
_ABSENT, _FINISHED, _DIVERGED, _FAILED = -1, 1_000_000, 1_000_001, 1_000_002
"""Where a rank may be instead of at the layer of a number."""
_WAY_OUT = "Leave the layers in question out by layers=, or take the batches as they come (normalization_batch_size=1)."


@dataclass(frozen=True)
class MicroBatch:
    """What a rank shows to the model at one time.

    Attributes:
        batch: The batch.
        number: Its place among this rank's batches; the first is 0.
        counts: False for one that is only there to keep other ranks company.
        samples: Samples in it, on this rank.
        everywhere: Samples of all ranks at the same time.
        ranks: Ranks with a batch of their own.
        small: Whether one of these holds fewer samples than are to be normalized together.
    """

    batch: Any
    number: int
    counts: bool
    samples: int
    everywhere: int
    ranks: int
    small: bool


class NotEnoughMemoryError(MemoryError):
    """Micro-batches that wait for each other would need more memory than is free; none was taken yet."""


class MemoryEstimate(NamedTuple):
    """What a micro-batch was seen to need: the most bytes alive at a layer, for so many samples, and its arrivals."""

    num_bytes: int
    samples: int
    arrivals: int


@dataclass
class ModelProfile:
    """What is known of a model from its first micro-batch; may be kept for another time.

    Attributes:
        needs: What it needs; None until it was run.
        independent: Whether it was seen that micro-batches do not influence each other.
        warned: Subjects of the warnings that were given: each is given once.
    """

    needs: MemoryEstimate | None = None
    independent: bool = False
    warned: set[str] = field(default_factory=set)


class _LayerCall(NamedTuple):
    """One call of a layer: what the first micro-batch brought, and the mean and variance that it was given."""

    name: str
    brought: InputMoments
    mean: Tensor
    var: Tensor


class _FirstBatchSnapshot:
    """A copy of the first micro-batch, since running it may change it, and where random numbers were when it began."""

    def __init__(self, batch: Any) -> None:
        self.batch = copied(batch)
        self._began = _generators()

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """Draw them from there, and on leaving from where they were before."""
        before = _generators()
        _set_generators(*self._began)
        try:
            yield
        finally:
            _set_generators(*before)


class PooledForward:
    """Runs micro-batches as one normalization batch.

    The first micro-batch is run twice more, alone: before, to see how much memory it needs, and behind, with the pooled
    statistics, to see that the others did not influence it.

    Args:
        layers: Qualified name -> number of channels.
        mode: What these layers do.
        seen: Where the statistics go.
        flags: Of these layers.
        run: Runs the model on one batch.
        device: Where it runs.
        memory_limit: Bytes that waiting micro-batches may take on each rank; what is beyond goes to the host's memory
            or to disk. By default it is an error to need more than is free.
        tried: What is known already, and where to put what is found out.

    Attributes:
        left_out: This rank's micro-batches that gave a layer non-finite values, and that layer.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        mode: InLockstep,
        seen: Accumulator,
        flags: LayerFlags,
        run: Callable[[Any], Any],
        device: torch.device,
        memory_limit: int | None,
        tried: ModelProfile,
    ) -> None:
        self._layers, self._mode, self._seen, self._flags, self._run = layers, mode, seen, flags, run
        self._device = device
        self._numbers = {name: number for number, name in enumerate(layers)}
        self._room = None if memory_limit is None else OffloadManager(memory_limit)
        self._first: _FirstBatchSnapshot | None = None
        self._tried = tried
        self._over = False
        self._finite: list[tuple[str, Tensor]] = []
        self.left_out: list[tuple[MicroBatch, str]] = []

    @property
    def spilled(self) -> int:
        """Bytes that were put elsewhere so far."""
        return self._room.spilled if self._room else 0

    def needs(self, own: MicroBatch) -> MemoryEstimate:
        """What the first micro-batch needs, found out by running it alone."""
        if own.batch is MISSING or not own.samples:
            return MemoryEstimate(0, 1, 0)
        if self._tried.needs is None:
            alive, seen = AllocationTracker(), [0]

            def exchange(name: str, brought: InputMoments) -> tuple[Tensor, Tensor]:
                seen.append(alive.num_bytes)
                return brought.mean, brought.var

            first = _FirstBatchSnapshot(own.batch)
            with self._exchanging(exchange), alive:
                self._run_single(first)  # with a copy of the batch, which counts
            self._tried.needs = MemoryEstimate(max(seen), own.samples, len(seen) - 1)
        return self._tried.needs

    def most(self, own: MicroBatch, share: float) -> int:
        """How many micro-batches like this one fit into a share of the memory that is free, on every rank."""
        with self._synchronized_errors():
            fit = int(share * self.free() // max(self.needs(own).num_bytes, 1))
        (fewest,) = max_over_ranks([-fit], self._device)
        return max(-fewest, 1)

    def run(self, micro_batches: Iterable[MicroBatch], progress: Callable[[float], None]) -> None:
        """Run micro-batches together, and put the statistics of every call of a layer into a slot.

        Args:
            micro_batches: This rank's, as many as on every other; none on a rank that never had a batch. Iterating a
                second time goes on where the first time ended.
            progress: Called with the share of the work that is done.

        Raises:
            LockstepError: If they come to different layers, or influence each other.
            NotEnoughMemoryError: If they need more memory than is free, and no ``memory_limit`` was given.
        """
        going: list[MicroBatch] = []
        met = self._run_together(micro_batches, going, progress)
        while (culprits := self._culprits(going)) is not None:
            self._seen.discard()
            bad = {m.number for m in culprits}
            going, left = [], [m for m in going if m.number not in bad]
            some_left, *_ = sum_over_ranks([sum(m.counts for m in left)], self._device)
            if not some_left:
                return
            met = self._run_together(left, going, progress)
        if not self._tried.independent:
            with self._synchronized_errors():
                if self._first:
                    self._verify(self._first, met)
            self._tried.independent, self._first = True, None
        progress(1.0)

    def _run_together(
        self, micro_batches: Iterable[MicroBatch], going: list[MicroBatch], progress: Callable[[float], None]
    ) -> list[_LayerCall]:
        """Run micro-batches together; what the first one brought and was given."""
        met: list[_LayerCall] = []
        done = 0
        self._finite, self._first = [], None

        def answer(name: str, brought: list[InputMoments]) -> Sequence[tuple[Tensor, Tensor]]:
            nonlocal done
            pooled = self._pool(name, [b if m.counts else b.of_nothing() for b, m in zip(brought, going, strict=True)])
            if not self._tried.independent:
                met.append(_LayerCall(name, brought[0], *pooled))
            done += 1
            progress(min(done / max(self.needs(going[0]).arrivals, done), 1.0))
            return [pooled] * len(going)

        lockstep = Lockstep[str, InputMoments, tuple[Tensor, Tensor]](answer, own_random_numbers=True, advice=_WAY_OUT)
        with (
            self._synchronized_errors(),
            self._drain_on_error(micro_batches),
            self._exchanging(self._with_own_flags(self._with_offload(lockstep.exchange))),
        ):
            lockstep.run(self._functions(micro_batches, going))
            if not going:
                self._join_collectives()
        return met

    def _culprits(self, going: Sequence[MicroBatch]) -> list[MicroBatch] | None:
        """This rank's micro-batches that brought non-finite values where any of any rank did first; None without any.

        At later layers all have them. One question to the device for all layers.
        """
        finite = torch.stack([row for _, row in self._finite]).tolist() if self._finite else []
        first = next((i for i, row in enumerate(finite) if not all(row)), _FINISHED)
        (minus_first,) = max_over_ranks([-first], self._device)
        if minus_first == -_FINISHED:
            return None
        name = self._finite[first][0] if first == -minus_first else ""
        culprits = [m for m, ok in zip(going, finite[first], strict=True) if not ok] if name else []
        self.left_out += [(m, name) for m in culprits]
        return culprits

    def _functions(self, micro_batches: Iterable[MicroBatch], going: list[MicroBatch]) -> Iterator[Callable[[], Any]]:
        """Micro-batches as functions to run, as long as there is memory for them."""
        free: int | None = None
        for own in micro_batches:
            needs = self.needs(own)
            free = self.free() if free is None else free
            if not going and not self._tried.independent:
                self._first = _FirstBatchSnapshot(own.batch)
            going.append(own)
            samples = sum(m.samples for m in going)
            expected = needs.num_bytes * samples / needs.samples
            if self._room is None and expected > free:
                raise NotEnoughMemoryError(
                    f"{len(going)} micro-batches of {samples} samples (on this rank) will keep about {expected:,.0f} "
                    f"bytes alive at the widest BatchNorm layer, and {free:,} are free. Pass a smaller normalization_batch_size, or "
                    "memory_limit=, the bytes above which those that wait are put to disk."
                )
            yield self._function(own.batch)

    def _function(self, batch: Any) -> Callable[[], Any]:
        def function() -> None:
            self._flags.reset()
            if self._room is None:
                self._run(copied(batch))  # a step may change it, and it may have to run again
            else:
                with self._room.keep_track() as alive:
                    _ALIVE.set(alive)
                    self._run(copied(batch))

        return function

    def _with_offload(self, exchange: SyncStatistics) -> SyncStatistics:
        """Wait where there is room."""
        room = self._room
        if room is None:
            return exchange

        def waiting(name: str, brought: InputMoments) -> tuple[Tensor, Tensor]:
            alive = _ALIVE.get(None)
            with room.waiting(alive, (brought.mean, brought.var)) if alive else nullcontext():  # none: another thread
                return exchange(name, brought)

        return waiting

    def _with_own_flags(self, exchange: SyncStatistics) -> SyncStatistics:
        """Wait, and go on with the layers' flags as they were: others set theirs meanwhile."""

        def exchanging(name: str, brought: InputMoments) -> tuple[Tensor, Tensor]:
            flags = self._flags.now()
            answer = exchange(name, brought)
            self._flags.set(flags)
            return answer

        return exchanging

    def _pool(self, name: str, brought: Sequence[InputMoments]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of what all micro-batches of all ranks bring to a layer."""
        counts = all(b.counts for b in brought)
        if not counts and any(b.counts for b in brought):
            raise LockstepError(f"Layer {name!r} tracks some micro-batches at a call, and others not. {_WAY_OUT}")
        self._all_reduce_position(self._numbers[name] + (0 if counts else len(self._numbers)))
        pooled, finite = _together(brought, self._seen.home)
        self._finite.append((name, finite))
        return self._merged(name, pooled, counts)

    def _merged(self, name: str, own: Moments, counts: bool) -> tuple[Tensor, Tensor]:
        pooled = merge_over_ranks(own)
        count = int(pooled.count.flatten()[0])
        if counts and count and get_rank() == 0:  # else all ranks would count what they have in common
            mean, var = self._seen.slot(name, count)
            mean.copy_(pooled.mean)
            var.copy_(pooled.var * (count / max(count - 1, 1)))
        return pooled.mean, pooled.var

    def _join_collectives(self) -> None:
        """What a rank without micro-batches does."""
        names = list(self._layers)
        while (number := self._all_reduce_position(_ABSENT)) < 2 * len(names):
            name = names[number % len(names)]
            self._merged(name, Moments.empty(self._layers[name], self._seen.home), number < len(names))

    def _verify(self, first: _FirstBatchSnapshot, met: Sequence[_LayerCall]) -> None:
        """Run the first micro-batch alone with the statistics that it was given, and see whether it brings the same."""
        expected = iter(met)

        def exchange(name: str, brought: InputMoments) -> tuple[Tensor, Tensor]:
            then = next(expected, None)
            if then is None or then.name != name or then.brought.values != brought.values or _differ(then, brought):
                raise LockstepError(
                    f"A micro-batch shows layer {name!r} something else in lockstep with others than alone: the model "
                    "keeps something of its own between layers, in an attribute or a list that a hook fills, or draws "
                    f"random numbers of its own. {_WAY_OUT}"
                )
            return then.mean, then.var

        with self._exchanging(exchange):
            self._run_single(first)

    def _run_single(self, first: _FirstBatchSnapshot) -> None:
        """Run a copy of the first micro-batch, with the random numbers that it draws in lockstep."""
        self._flags.reset()
        with first.random_numbers(), next(random_streams()).activate():
            self._run(copied(first.batch))

    def free(self) -> int:
        """Bytes of memory that this rank may still take."""
        free = free_memory(self._device)
        return free if self._device.type == "cuda" else free // get_world_size()  # which share the host

    @contextmanager
    def _exchanging(self, exchange: SyncStatistics) -> Iterator[None]:
        before, self._mode.exchange = self._mode.exchange, exchange
        try:
            yield
        finally:
            self._mode.exchange = before

    @staticmethod
    @contextmanager
    def _drain_on_error(micro_batches: Iterable[MicroBatch]) -> Iterator[None]:
        """Where ranks count together what they take: one that fails takes the rest before it tells the others."""
        try:
            yield
        except Exception:
            if get_world_size() > 1:
                for _ in micro_batches:
                    pass
            raise

    @contextmanager
    def _synchronized_errors(self) -> Iterator[None]:
        """All ranks come through, or none."""
        self._over = False
        try:
            yield
        except BaseException as error:
            if not self._over:
                with suppress(RuntimeError):
                    self._all_reduce_position(_DIVERGED if isinstance(error, LockstepError) else _FAILED)
            raise
        if not self._over:
            self._all_reduce_position(_FINISHED)

    def _all_reduce_position(self, own: int) -> int:
        """The place where all ranks are that have micro-batches: a layer's number, or one of those above.

        Raises:
            LockstepError: If they are at different ones.
            AnotherRankFailedError: If a rank has failed.
        """
        present = own != _ABSENT
        last, minus_first = max_over_ranks([own, -own if present else -_FAILED], self._device)
        self._over = last >= _FINISHED or last != -minus_first
        if last == _FAILED:
            raise AnotherRankFailedError
        if last == _DIVERGED:
            raise LockstepError("Micro-batches of another rank cannot go in lockstep; its error says why.")
        if last != -minus_first:
            names = list(self._layers)
            first, second = (names[n % len(names)] if n < _FINISHED else "their end" for n in (-minus_first, last))
            raise LockstepError(
                f"Ranks diverge: micro-batches are at {first} on one and at {second} on another. {_WAY_OUT}"
            )
        return last


_ALIVE: ContextVar[AllocationTracker] = ContextVar("alive")
"""What keeps track of the micro-batch that is running."""


def _together(brought: Sequence[InputMoments], home: torch.device) -> tuple[Moments, Tensor]:
    """Moments of what several micro-batches bring, in one go, and which of them are finite, ``(k,)``.

    The count stays on the CPU, where it is known.
    """
    count = torch.tensor([[float(b.values)] for b in brought], dtype=torch.float64)
    mean, var = (torch.stack([getattr(b, part) for b in brought]).to(home).double() for part in ("mean", "var"))
    share = (count / count.sum().clamp(min=1)).to(home)
    pooled = (share * mean).sum(0)
    moments = Moments(count.sum(), pooled, (share * (var + (mean - pooled).square())).sum(0) * float(count.sum()))
    return moments, (mean.isfinite() & var.isfinite()).all(1)


def _differ(then: _LayerCall, now: InputMoments) -> bool:
    """Whether the means of a micro-batch are not those that it brought then."""
    off = (now.mean - then.brought.mean).abs() / (then.var + 1e-5).sqrt().to(now.mean)
    return bool(off.amax() > _MAX_MEAN_SHIFT)  # NaN, of non-finite values, is for the statistics' own check


def _generators() -> tuple[Any, Any, Tensor]:
    """States of Python's, NumPy's and torch's global generators; CUDA's is not drawn from here."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_generators(of_python: Any, of_numpy: Any, of_torch: Tensor) -> None:
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
