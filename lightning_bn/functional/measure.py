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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import inf
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.distributed.moments import merge_over_ranks, num_ranks, sum_over_ranks
from lightning_bn.functional.arguments import require_whole
from lightning_bn.functional.pooled import NOTHING, MicroBatch, Pooled, Tried
from lightning_bn.functional.samples import Count, counted_by
from lightning_bn.layers.batch_mode import of_domain
from lightning_bn.layers.behaviour import Handle
from lightning_bn.layers.domain_specific import num_domains
from lightning_bn.layers.in_lockstep import InLockstep
from lightning_bn.statistics.population import Accumulator, LayerStatistics, PopulationStatistics, together

BatchSize: TypeAlias = int | Literal["population"] | None
"""B of Table 2: samples to normalise together, of all ranks; None takes the batches as they come."""
Progress: TypeAlias = Callable[[int | None], "contextlib.AbstractContextManager[Callable[[int], None]]"]
"""Opens a progress display for a total number of samples (None: unknown); what it yields is told of each batch's."""

_SPREAD = 8
"""Fewest normalization batches whose spread says something: with 8 it is known to a quarter."""


def measure(
    layers: dict[str, _BatchNorm],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    *,
    batch_size: BatchSize = None,
    num_samples: int | None = None,
    tolerance: float | None = None,
    memory_limit: int | None = None,
    at_most: float | None = None,
    say: Callable[[str], Any] = warnings.warn,
    tried: Tried | None = None,
    count: Count | None = None,
    progress: Progress | None = None,
) -> PopulationStatistics:
    """Run batches, eagerly and without gradients, and return what ``layers`` were shown. Writes nothing.

    Args:
        layers: Qualified name -> layer.
        batches: This rank's batches.
        run: Runs the model on one batch.
        batch_size: Samples of all ranks to normalise together.
        num_samples: Stop after so many samples of all ranks; None takes all batches.
        tolerance: Stop as soon as the standard errors of every layer are below it.
        memory_limit: Bytes that waiting micro-batches may take on each rank.
        at_most: Rather than more than this share of the memory that is free, take a smaller ``batch_size``.
        say: Told that it was so.
        tried: What an earlier measurement of the model has shown of its micro-batches.
        count: Samples in a batch.
        progress: Display to show the progress on.

    Raises:
        ValueError: If there was no batch, no layer was reached, or a layer received non-finite values.
        LockstepError: If batches cannot be normalised together.
        MemoryError: If the memory that is free does not suffice for that.
    """
    check_amounts(batch_size, num_samples, tolerance, memory_limit)
    if memory_limit is not None and batch_size is None:
        raise ValueError("memory_limit= is for batches that wait for each other, and without batch_size= none does.")
    device, dtype = _home(layers)
    parts = _with_domains(layers)
    seen = Accumulator({name: layer.num_features for name, layer in parts.items()}, device, dtype)
    mode = InLockstep(layers, seen)
    pooled = Pooled(parts, mode, seen, run, device, memory_limit, tried or Tried())
    wanted = inf if batch_size == "population" else batch_size or 0
    samples = batches_seen = normalizations = 0
    told = False
    look_again = _SPREAD

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(Handle(layers.values(), mode))
        advance = stack.enter_context((progress or no_progress)(num_samples))
        rounds = _rounds(batches, num_samples, count, layers, wanted, device)
        for first in rounds:
            most = inf
            if (
                first.small
                and at_most is not None
                and first.everywhere * (most := pooled.most(first, at_most)) < wanted
                and not told
            ):
                say(_less(wanted, first, int(most), pooled))
                told = True
            if first.small and most > 1:
                group = _Group(itertools.chain([first], rounds), wanted, most, advance)
                pooled.run(group, group.progress)
                together, normalizations = group.taken, normalizations + 1
            else:
                mode.counts = first.counts
                if first.batch is not NOTHING:
                    run(first.batch)
                together, normalizations = [first], normalizations + first.ranks
                advance(first.everywhere)
            seen.end_of_batch()
            samples += sum(m.everywhere for m in together)
            batches_seen += sum(m.ranks for m in together)
            if tolerance is not None and normalizations >= look_again:
                look_again = math.ceil(1.1 * normalizations)  # a look costs, and each could be lucky
                if _largest_error(_statistics(seen, device)) < tolerance:
                    break
        statistics = _statistics(seen, device)
        _refuse_unusable(statistics, layers)
        statistics = _with_domains_folded(statistics, layers)
        return PopulationStatistics(statistics, samples, batches_seen, samples / normalizations, pooled.spilled)


class _Group:
    """Rounds that are normalised together: until they hold enough samples.

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
            if own.batch is not NOTHING:
                yield own

    def progress(self, share: float) -> None:
        """Show the share of the work on it that is done."""
        done = int(share * self.samples)
        self._advance(done - self._shown)
        self._shown = done


def _rounds(
    batches: Iterable[Any],
    num_samples: int | None,
    count: Count | None,
    layers: Mapping[str, _BatchNorm],
    wanted: float,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """This rank's batches, one for each that any rank has."""
    samples = 0
    batch = NOTHING
    count = counted_by(count)
    iterator = iter(batches)
    while num_samples is None or samples < num_samples:
        fresh = next(iterator, NOTHING)
        counts = fresh is not NOTHING
        batch = fresh if counts else batch
        own = count(batch) if counts else 0
        ready, more, small = sum_over_ranks([counts, own, counts and own < wanted], device)
        if not ready:
            return
        if not samples and ready < num_ranks() and any(isinstance(m, SyncBatchNorm) for m in layers.values()):
            raise ValueError(
                f"Only {ready} of {num_ranks()} ranks have a batch, and the SyncBatchNorm layers of one rank wait "
                "for those of all others: give every rank at least one batch."
            )
        samples += more
        yield MicroBatch(batch, counts, own, more, ready, bool(small))


def _less(wanted: float, first: MicroBatch, most: int, pooled: Pooled) -> str:
    needs = pooled.needs(first)
    return (
        f"Population statistics are estimated with normalization batches of {most * first.everywhere} samples, not of "
        f"{wanted:.0f}: those would keep about {wanted / first.everywhere * needs.num_bytes / 1e9:.1f} GB alive on "
        f"each rank, more than half of the {pooled.free() / 1e9:.1f} GB that are free. Small ones accumulate error in "
        "depth (paper, Table 2): pass memory_limit= to put the rest to disk, or batch_size=1 to agree."
    )


def _largest_error(statistics: Mapping[str, LayerStatistics]) -> float:
    """The larger of the two standard errors of the worst layer, each the rms over its channels."""
    if any(s.calls < 2 for s in statistics.values()):
        return inf  # of a layer that was called once nobody knows
    errors = [e for s in statistics.values() for e in (s.standard_error, s.var_standard_error)]
    # a channel without variance has no error either, and 0/0 says so
    return max(float(e.nan_to_num(0.0, posinf=0.0).square().mean().sqrt()) for e in errors)


def _statistics(seen: Accumulator, device: torch.device) -> dict[str, LayerStatistics]:
    """What the layers were shown so far on all ranks."""
    of_all = copy.copy(seen)
    of_all.values, of_all.spread = merge_over_ranks(seen.values), merge_over_ranks(seen.spread)
    of_all.calls = dict(zip(seen.calls, sum_over_ranks(list(seen.calls.values()), device), strict=True))
    return of_all.statistics()


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


def _refuse_unusable(statistics: Mapping[str, LayerStatistics], layers: Iterable[str]) -> None:
    """Raise, on every rank alike, for statistics that no layer can normalise with.

    Raises:
        ValueError: Naming the layer, and what to do.
    """
    if not statistics:
        raise ValueError(
            f"No batch reached a BatchNorm layer of {', '.join(layers)}: is the iterable of batches empty, or does "
            "the forward go round them?"
        )
    bad = [name for name, s in statistics.items() if not (s.mean.isfinite().all() and s.var.isfinite().all())]
    if bad:
        raise ValueError(
            f"Layer {bad[0]!r} received non-finite values, or such whose squares overflow ({len(bad)} of "
            f"{len(statistics)} layers did), so no statistics were written. Look at the batches and the weights."
        )
    single = [name for name, s in statistics.items() if s.count < 2]
    if single:
        raise ValueError(
            f"Layer {single[0]!r} received one value per channel in all, which has no variance, so no statistics were "
            "written: show it more samples."
        )


def check_amounts(
    batch_size: BatchSize, num_samples: int | None, tolerance: float | None, memory_limit: int | None
) -> None:
    """Refuse what is no amount, and amounts that contradict each other.

    Raises:
        TypeError: If one is of the wrong type.
        ValueError: If one is out of range, or has no meaning beside another.
    """
    for name, value in (("num_samples", num_samples), ("memory_limit", memory_limit)):
        if value is not None:
            require_whole(name, value, at_least=1)
    if isinstance(batch_size, str) and batch_size != "population":
        raise ValueError(f"batch_size must be a number of samples, 'population' or None but is {batch_size!r}.")
    if batch_size is not None and batch_size != "population":
        require_whole("batch_size", batch_size, at_least=1)
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance must be a number but is {tolerance!r}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0 but is {tolerance}.")
    if batch_size == "population":
        raise ValueError(
            "tolerance= stops once the spread of normalization batches says that there were enough, and "
            "batch_size='population' is a single one: leave one of them out."
        )


def _home(layers: Mapping[str, _BatchNorm]) -> tuple[torch.device, torch.dtype]:
    """Where statistics are added up, and the precision they come in: those of the first layer, at least float32."""
    first = next(layer.running_mean for layer in layers.values() if isinstance(layer.running_mean, Tensor))
    return first.device, torch.promote_types(first.dtype, torch.float32)


@contextlib.contextmanager
def no_progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress display that shows nothing."""
    yield lambda samples: None
