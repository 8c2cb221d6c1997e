"""Measuring what the layers of a fixed model are shown: batch by batch, or many batches as one.

Every rank runs as many forwards as the one with most batches, so that collectives inside the model match: a rank that
has run out repeats its last batch, which then counts for nothing.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_int
from lightning_bn.core.population import Accumulator, LayerStatistics, PopulationStatistics, together
from lightning_bn.core.ranks import (
    AnotherRankFailedError,
    get_rank,
    get_world_size,
    max_over_ranks,
    merge_over_ranks,
    sum_over_ranks,
)
from lightning_bn.functional.domain.tensors import num_domains
from lightning_bn.layers.batch_mode import of_domain
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.modes import preserve_flags
from lightning_bn.lockstep.in_lockstep import InLockstep
from lightning_bn.lockstep.pooled import MISSING, MicroBatch, ModelProfile, PooledForward

NormalizationBatchSize: TypeAlias = int | Literal["auto", "loader", "population"]
"""Samples of all ranks that are normalized jointly. "loader": the batches as they come."""
Progress: TypeAlias = Callable[[int | None], "contextlib.AbstractContextManager[Callable[[int], None]]"]
"""Context manager for a progress bar; yields an ``update(num_samples)`` function. Takes the total, or None."""

_MIN_GROUPS_FOR_STD_ERROR = 8
"""Fewest normalization batches whose spread says something: with 8 it is known to a quarter."""


_MIN_AUTO_BATCH_SIZE, _AUTO_BATCH_SIZE = 32, 100
"""With "auto": batches of fewer samples are normalized jointly, until there are so many (paper, Table 2)."""


@dataclass(frozen=True)
class PassConfig:
    """The user's numbers for a pass over data; validated once.

    Attributes:
        num_samples: Stop after so many samples of all ranks, in whole batches; None takes all batches.
        normalization_batch_size: Samples of all ranks that are normalized jointly.
        tolerance: Stop as soon as the standard errors of every layer are below it; None never stops early.
        memory_limit: Bytes that batches waiting for each other may take on each rank.
        batch_size_fn: Number of samples in a batch; None infers it.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or has no meaning beside another.
    """

    num_samples: int | None = None
    normalization_batch_size: NormalizationBatchSize = "auto"
    tolerance: float | None = None
    memory_limit: int | None = None
    batch_size_fn: BatchSizeFn | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "memory_limit"):
            if (value := getattr(self, name)) is not None:
                check_int(name, value, at_least=1)
        as_batch_size_fn(self.batch_size_fn)
        size, tolerance = self.normalization_batch_size, self.tolerance
        if size not in ("auto", "loader", "population"):
            if size is None or isinstance(size, str):
                raise ValueError(
                    "normalization_batch_size must be a number of samples, 'auto', 'loader' (batches as they come) or "
                    f"'population' but is {size!r}."
                )
            check_int("normalization_batch_size", size, at_least=1)
        if self.memory_limit is not None and size == "loader":
            raise ValueError(
                "memory_limit= is for batches that wait for each other, and with normalization_batch_size='loader' "
                "none does: leave one of them out."
            )
        if tolerance is None:
            return
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
            raise TypeError(f"tolerance must be a number but is {tolerance!r}.")
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0 but is {tolerance}.")
        if size == "population":
            raise ValueError(
                "tolerance= needs several normalization batches to compare, and normalization_batch_size='population' "
                "is a single one: leave one of them out."
            )


def measure(
    layers: dict[str, _BatchNorm],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    config: PassConfig,
    *,
    profile: ModelProfile | None = None,
    of_training: bool = True,
    progress: Progress | None = None,
) -> PopulationStatistics:
    """Run batches, eagerly and without gradients, and return the statistics of the inputs of ``layers``.

    Writes nothing into the layers. Every rank calls this, each with its own batches, in any number.

    Args:
        layers: Qualified name -> layer.
        batches: This rank's batches.
        run: Runs the model on one batch.
        config: The user's numbers.
        profile: Facts about the model that an earlier call with it found out; this call adds its own.
        of_training: Measure the inputs that would move the running statistics in training: layers begin each batch in
            train mode, and what ``run`` then does to their mode, momentum or tracking is honored. If False, measure
            all inputs, in the modes that the layers have.
        progress: Display to show the progress on.

    Raises:
        ValueError: If there was no batch, no layer was reached, or all batches gave a layer non-finite values.
        TypeError: If a layer's forward makes no ``batch_norm`` call.
        LockstepError: If batches cannot be normalized jointly.
        MemoryError: If free memory does not suffice for that.
    """
    num_samples, tolerance, memory_limit = config.num_samples, config.tolerance, config.memory_limit
    batch_size_fn, size = config.batch_size_fn, config.normalization_batch_size
    tried = profile = profile or ModelProfile()
    at_most = 0.5 if size == "auto" and memory_limit is None else None

    def say(about: str, message: str) -> None:
        if about not in profile.warned and get_rank() == 0:
            warnings.warn(message, stacklevel=3)
        profile.warned.add(about)

    device, dtype = _device_and_dtype(layers)
    parts = _with_domains(layers)
    channels = {name: layer.get_buffer("running_mean").numel() for name, layer in parts.items()}
    seen = Accumulator(channels, device, dtype)
    mode = InLockstep(layers, seen, of_training)
    wanted: float = {"population": inf, "auto": _MIN_AUTO_BATCH_SIZE, "loader": 0}.get(size, size)
    told = False
    look_again = _MIN_GROUPS_FOR_STD_ERROR
    taken = _Taken()

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(Handle(layers.values(), mode))
        flags = stack.enter_context(preserve_flags(layers.values(), training=True if of_training else None))
        pooled = PooledForward(channels, mode, seen, flags, run, device, memory_limit, tried)
        advance = stack.enter_context((progress or no_progress)(num_samples))
        rounds = _SynchronizedBatches(batches, num_samples, batch_size_fn, layers, wanted, device)
        for first in rounds:
            if size == "auto" and not taken.normalizations:  # the first batch decides
                wanted = rounds.wanted = _AUTO_BATCH_SIZE if first.small else 0
            most = inf
            if first.small and at_most is not None:
                most = pooled.most(first, at_most)
                if first.everywhere * most < wanted and not told:
                    say("memory", _reduced_batch_size_message(wanted, first, int(most), pooled))
                    told = True
            if first.small and most > 1:
                group = _BatchGroup(itertools.chain([first], rounds), wanted, most, advance)
                pooled.run(group, group.progress)
                taken.add(group.taken, normalizations=1)
            else:
                mode.counts = first.counts
                flags.reset()
                with rounds.failing_together():
                    if first.batch is not MISSING:
                        run(first.batch)
                taken.add([first], normalizations=first.ranks)
                advance(first.everywhere)
            seen.end_of_batch()
            if tolerance is not None and taken.normalizations >= look_again:
                look_again = math.ceil(1.1 * taken.normalizations)  # a look costs, and each could be lucky
                rounds.agree()
                if _max_standard_error(_statistics(seen, device)) < tolerance:
                    break
        rounds.agree()
        statistics = _statistics(seen, device)
        left_out = _LeftOut.of(taken, seen, pooled, device)
        _check_unusable(statistics, layers, left_out)
        if left_out.batches:
            say("left out", left_out.message())
        samples = taken.samples - left_out.samples
        return PopulationStatistics(
            _with_domains_folded(statistics, layers),
            samples,
            taken.batches - left_out.batches,
            samples / (taken.normalizations - left_out.normalizations),
            pooled.spilled,
            left_out.batches,
        )


class _Taken:
    """What was shown to the model so far.

    Attributes:
        samples: Samples of all ranks.
        batches: Batches of all ranks.
        normalizations: Normalization batches of all ranks.
        own: Number and samples of this rank's first batch in each merge.
    """

    def __init__(self) -> None:
        self.samples = self.batches = self.normalizations = 0
        self.own: list[tuple[int, int]] = []

    def add(self, together: Sequence[MicroBatch], normalizations: int) -> None:
        """Add batches that were merged together."""
        self.samples += sum(m.everywhere for m in together)
        self.batches += sum(m.ranks for m in together)
        self.normalizations += normalizations
        self.own.append((together[0].number, together[0].samples))


@dataclass(frozen=True)
class _LeftOut:
    """Batches that gave a layer non-finite values.

    Attributes:
        samples: Their samples, of all ranks.
        batches: How many there are on all ranks.
        normalizations: How many of them were normalized by themselves.
        first: Number of the first of them, and the layer that was given such values first.
    """

    samples: int
    batches: int
    normalizations: int
    first: tuple[int, str] | None

    @classmethod
    def of(cls, taken: _Taken, seen: Accumulator, pooled: PooledForward, device: torch.device) -> _LeftOut:
        """Those of all ranks."""
        alone = [(*taken.own[place], layer) for place, layer in seen.nonfinite().items()]
        own = [*alone, *((m.number, m.samples, layer) for m, layer in pooled.left_out)]
        samples = sum(samples for _, samples, _ in own)
        samples, batches, normalizations = sum_over_ranks([samples, len(own), len(alone)], device)
        if not batches:
            return cls(0, 0, 0, None)
        names = list(seen.channels)
        number, _, layer = min(own, default=(-_NEVER, 0, names[0]))
        (first,) = max_over_ranks([-number], device)
        (place,) = max_over_ranks([names.index(layer) if number == -first else -1], device)
        return cls(samples, batches, normalizations, (-first, names[place]))

    def message(self) -> str:
        """What to say of them."""
        assert self.first is not None
        number, layer = self.first
        others = f", and so are {self.batches - 1} others" if self.batches > 1 else ""
        return (
            f"Batch {number} of a pass over data is left out of the statistics{others}: it gives layer {layer!r} "
            "non-finite values, or such whose squares overflow."
        )


_NEVER = 2**62
"""More than there are batches."""


class _BatchGroup:
    """Rounds that are normalized together: until they hold enough samples.

    Attributes:
        taken: Those so far.
    """

    def __init__(
        self, rounds: Iterator[MicroBatch], wanted: float, most: float, advance: Callable[[int], None]
    ) -> None:
        self._rounds, self._wanted, self._most, self._advance = rounds, wanted, most, advance
        self.taken: list[MicroBatch] = []
        self._shown = 0

    @property
    def samples(self) -> int:
        """Samples of all ranks in it."""
        return sum(m.everywhere for m in self.taken)

    def __iter__(self) -> Iterator[MicroBatch]:
        while self.samples < self._wanted and len(self.taken) < self._most:
            own = next(self._rounds, None)
            if own is None:
                return
            self.taken.append(own)
            if own.batch is not MISSING:
                yield own

    def progress(self, share: float) -> None:
        """Show the share of the work on it that is done."""
        done = int(share * self.samples)
        self._advance(done - self._shown)
        self._shown = done


class _SynchronizedBatches:
    """This rank's batches, one for each that any rank has; rounds in which all are empty are skipped.

    Ranks fail together: one that raises while it fetches or runs a batch tells the others, which raise as well.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        num_samples: int | None,
        batch_size_fn: BatchSizeFn | None,
        layers: Mapping[str, _BatchNorm],
        wanted: float,
        device: torch.device,
    ) -> None:
        self._batches, self._num_samples, self._count = iter(batches), num_samples, as_batch_size_fn(batch_size_fn)
        self.wanted, self._device = wanted, device
        self._synced = any(isinstance(m, SyncBatchNorm) for m in layers.values())
        self._rounds = self._all()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self._rounds

    def agree(self, ready: bool = False, samples: int = 0, small: bool = False, failed: bool = False) -> list[int]:
        """What all ranks have: batches, samples, small batches.

        Raises:
            AnotherRankFailedError: If it is so.
        """
        *found, failures = sum_over_ranks([ready, samples, small, failed], self._device)
        if failures and not failed:
            raise AnotherRankFailedError
        return found

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the other ranks of an error, where they come next."""
        try:
            yield
        except BaseException:
            if get_world_size() > 1:
                self.agree(failed=True)
            raise

    def _all(self) -> Iterator[MicroBatch]:
        samples, batch = 0, MISSING
        for number in itertools.count():
            if self._num_samples is not None and samples >= self._num_samples:
                return
            with self.failing_together():
                fresh = next(self._batches, MISSING)
                counts = fresh is not MISSING
                own = self._count(fresh) if counts else 0
            batch = fresh if counts else batch
            ready, more, small = self.agree(counts, own, counts and own < self.wanted)
            if not ready:
                return
            if not samples and ready < get_world_size() and self._synced:
                raise ValueError(
                    f"Only {ready} of {get_world_size()} ranks have a batch, and the SyncBatchNorm layers of one rank "
                    "wait for those of all others: give every rank at least one batch."
                )
            samples += more
            if more:
                yield MicroBatch(batch, number, counts, own, more, ready, bool(small))


def _reduced_batch_size_message(wanted: float, first: MicroBatch, most: int, pooled: PooledForward) -> str:
    needs = pooled.needs(first)
    return (
        f"Population statistics are estimated with normalization batches of {most * first.everywhere} samples, not of "
        f"{wanted:.0f}: those would keep about {wanted / first.everywhere * needs.num_bytes / 1e9:.1f} GB alive on "
        f"each rank, more than half of the {pooled.free() / 1e9:.1f} GB that are free. Small ones accumulate error in "
        "depth (paper, Table 2): pass memory_limit= to put the rest to disk, or normalization_batch_size=1 to agree."
    )


def _max_standard_error(statistics: Mapping[str, LayerStatistics]) -> float:
    """The larger of the two standard errors of the worst layer, each the rms over its channels."""
    if any(s.calls < 2 for s in statistics.values()):
        return inf  # a single call gives no error estimate
    errors = [e for s in statistics.values() for e in (s.standard_error, s.var_standard_error)]
    # a channel without variance has no error either, and 0/0 says so
    return max(float(e.nan_to_num(0.0, posinf=0.0).square().mean().sqrt()) for e in errors)


def _statistics(seen: Accumulator, device: torch.device) -> dict[str, LayerStatistics]:
    """What the layers were shown so far on all ranks."""
    of_all = copy.copy(seen)
    of_all.values, of_all.spread = merge_over_ranks(seen.values), merge_over_ranks(seen.spread)
    calls = seen.calls
    return of_all.statistics(dict(zip(calls, sum_over_ranks(list(calls.values()), device), strict=True)))


def _with_domains(layers: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """All names under which something may be measured: those of layers, and those of their domains."""
    return {
        part: layer
        for name, layer in layers.items()
        for part in (name, *(of_domain(name, domain) for domain in range(num_domains(layer))))
    }


def _with_domains_folded(
    statistics: Mapping[str, LayerStatistics], layers: Mapping[str, _BatchNorm]
) -> dict[str, LayerStatistics]:
    """The statistics of layers, with those of their domains in them."""
    found = {}
    for name, layer in layers.items():
        domains = tuple(statistics.get(of_domain(name, domain)) for domain in range(num_domains(layer)))
        whole = statistics.get(name) or together([d for d in domains if d is not None])
        if whole is not None:
            found[name] = replace(whole, domains=domains)
    return found


def _check_unusable(statistics: Mapping[str, LayerStatistics], layers: Iterable[str], left_out: _LeftOut) -> None:
    """Raise, on every rank alike, for statistics that no layer can normalize with.

    Raises:
        ValueError: Naming the layer, and what to do.
    """
    bad = [name for name, s in statistics.items() if not (s.mean.isfinite().all() and s.var.isfinite().all())]
    if left_out.first is not None and not statistics:
        bad = [left_out.first[1]]
    if bad:
        raise ValueError(
            f"Layer {bad[0]!r} received non-finite values, or such whose squares overflow, in every batch, so no "
            "statistics were written. Look at the batches and the weights."
        )
    if not statistics:
        raise ValueError(
            f"No batch reached a BatchNorm layer of {', '.join(layers)} in a way that training would track (in train "
            "mode, with track_running_stats and a momentum other than 0): is the iterable of batches empty, or does "
            "the forward go round them?"
        )
    single = [name for name, s in statistics.items() if s.count < 2]
    if single:
        raise ValueError(
            f"Layer {single[0]!r} received one value per channel in all, which has no variance, so no statistics were "
            "written: show it more samples."
        )


def _device_and_dtype(layers: Mapping[str, _BatchNorm]) -> tuple[torch.device, torch.dtype]:
    """Where statistics are added up, and the precision they come in: those of the first layer, at least float32."""
    first = next(layer.running_mean for layer in layers.values() if isinstance(layer.running_mean, Tensor))
    return first.device, torch.promote_types(first.dtype, torch.float32)


@contextlib.contextmanager
def no_progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress display that shows nothing."""
    yield lambda samples: None
