"""Measure the inputs of the BatchNorm layers of a fixed model: batch by batch, or many batches jointly."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_int
from lightning_bn.core.micro_batches import MISSING, MicroBatch, SynchronizedBatches
from lightning_bn.core.population import Accumulator, LayerStatistics, PopulationStatistics
from lightning_bn.core.ranks import max_over_ranks, sum_over_ranks
from lightning_bn.functional.domain.tensors import STATISTICS, num_domains
from lightning_bn.functional.joint import JointBatches, warn_once
from lightning_bn.layers.batch_mode import BatchMode, of_domain
from lightning_bn.layers.behavior import attach, detach
from lightning_bn.layers.modes import preserve_flags
from lightning_bn.lockstep.pooled import PooledForward
from lightning_bn.lockstep.trial import ModelProfile

NormalizationBatchSize: TypeAlias = int | Literal["auto", "loader", "population"]
"""Samples of all ranks that are normalized jointly. "loader": the batches as they come."""
Progress: TypeAlias = Callable[[int | None], "contextlib.AbstractContextManager[Callable[[int], None]]"]
"""Context manager for a progress bar; yields an ``update(num_samples)`` function. Takes the total, or None."""

_MIN_AUTO_BATCH_SIZE, _AUTO_BATCH_SIZE = 32, 100
"""With "auto": batches of fewer samples are normalized jointly, until there are so many (paper, Table 2)."""
_MIN_SIZES = {"auto": _MIN_AUTO_BATCH_SIZE, "loader": 0, "population": inf}
_ALL_FROZEN = (
    "All chosen BatchNorm layers are frozen (by freeze_bn or BaseFinetuning, or in eval mode while the model is in "
    "train mode): there are no statistics to recompute."
)
_MIN_BATCHES_FOR_STD_ERROR = 8  # the spread of 8 is known to a quarter of itself


@dataclass(frozen=True)
class MeasureConfig:
    """The user's numbers for a pass over data, as `precise_bn` describes them; validated once."""

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
        size, tolerance, option = self.normalization_batch_size, self.tolerance, "normalization_batch_size"
        if size not in ("auto", "loader", "population"):
            if size is None or isinstance(size, str):
                choices = "a number of samples, 'auto', 'loader' (batches as they come) or 'population'"
                raise ValueError(f"{option} must be {choices} but is {size!r}.")
            check_int(option, size, at_least=1)
        if self.memory_limit is not None and size == "loader":
            raise ValueError(f"memory_limit= has no use with {option}='loader': leave one of them out.")
        if tolerance is None:
            return
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
            raise TypeError(f"tolerance must be a number but is {tolerance!r}.")
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0 but is {tolerance}.")
        if size == "population":
            raise ValueError(
                f"tolerance= compares batches, and {option}='population' is a single one: leave one of them out."
            )


@torch.inference_mode(False)
@torch.no_grad()
def measure(
    layers: dict[str, _BatchNorm],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    config: MeasureConfig,
    *,
    profile: ModelProfile | None = None,
    of_training: bool = True,
    progress: Progress | None = None,
) -> PopulationStatistics:
    """Run batches, eagerly and without gradients, and return the statistics of the inputs of ``layers``.

    Writes nothing into the layers. With ``of_training`` it measures the inputs that would move the running statistics
    in training: layers begin each batch in train mode, and what ``run`` then does to their mode, momentum or tracking
    is honored. Without, it measures all inputs, in the modes that the layers have.
    """
    if not layers:
        raise ValueError(_ALL_FROZEN)
    profile, accumulator, totals = profile or ModelProfile(), _accumulator(layers), _Totals()
    mode, joint = BatchMode(layers, accumulator, of_training), None
    size, count = config.normalization_batch_size, as_batch_size_fn(config.batch_size_fn)
    min_size = _MIN_SIZES[size] if isinstance(size, str) else size
    has_synced = bool([layer for layer in layers.values() if isinstance(layer, SyncBatchNorm)])
    steps = SynchronizedBatches(batches, config.num_samples, count, accumulator.device, has_synced, min_size)
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        flags = stack.enter_context(preserve_flags(layers.values(), training=True if of_training else None))
        show = progress(config.num_samples) if progress else contextlib.nullcontext(lambda samples: None)
        advance: Callable[[int], None] = stack.enter_context(show)
        for layer in layers.values():
            attach(layer, mode)
            stack.callback(detach, layer, mode)
        for step in (iterator := iter(steps)):
            if size == "auto" and not totals.normalizations:  # the first batch decides
                steps.min_size = _AUTO_BATCH_SIZE if step.is_small else 0
            if step.is_small and joint is None:
                pooled = PooledForward(mode, flags, run, config.memory_limit, profile)
                joint = JointBatches(pooled, profile, steps.min_size, size == "auto", advance)
            group = joint.run(step, iterator) if joint and step.is_small else []
            if not group:
                mode.is_padding = step.is_padding
                flags.set(flags.initial)
                with steps.failing_together():
                    if step.batch is not MISSING:
                        run(step.batch)
                advance(step.global_size)
            totals.add(group or [step], normalizations=1 if group else step.ranks)
            accumulator.end_of_batch()
            if config.tolerance is not None and totals.is_time_to_compare():
                steps.check_failures()
                if _max_standard_error(accumulator.statistics()[0]) < config.tolerance:
                    break
    statistics, nonfinite = accumulator.statistics()
    left_out = totals.leave_out(nonfinite, joint, accumulator)
    return _result(statistics, layers, totals, left_out, joint, profile)


@dataclass
class _Totals:
    """Samples, batches and normalization batches of all ranks so far; ``left_out`` ones are subtracted at the end."""

    samples: int = 0
    batches: int = 0
    normalizations: int = 0
    left_out: int = 0
    merged: list[tuple[int, int]] = field(default_factory=list)  # number and samples of the first batch of each merge
    next_comparison: int = _MIN_BATCHES_FOR_STD_ERROR  # when there are so many normalization batches

    def add(self, group: list[MicroBatch], normalizations: int) -> None:
        self.samples += sum([m.global_size for m in group])
        self.batches += sum([m.ranks for m in group])
        self.normalizations += normalizations
        self.merged.append((group[0].number, group[0].samples))

    def is_time_to_compare(self) -> bool:
        """Return True from time to time: a comparison takes time, and each could be below the tolerance by chance."""
        if self.normalizations < self.next_comparison:
            return False
        self.next_comparison = math.ceil(1.1 * self.normalizations)
        return True

    def leave_out(
        self, nonfinite: Mapping[int, str], joint: JointBatches | None, accumulator: Accumulator
    ) -> tuple[int, str] | None:
        """Subtract the batches that gave a layer non-finite values; the first one's number, and the first layer."""
        device, names = accumulator.device, list(accumulator.channels)
        bad = [(*self.merged[merge], layer) for merge, layer in nonfinite.items()]
        if joint:
            bad += [(m.number, m.samples, layer) for m, layer in joint.pooled.left_out]
        own = [sum([n for _, n, _ in bad]), len(bad), len(nonfinite)]
        samples, self.left_out, normalizations = sum_over_ranks(own, device)
        if not self.left_out:
            return None
        self.samples, self.batches = self.samples - samples, self.batches - self.left_out
        self.normalizations -= normalizations
        number, _, layer = min(bad, default=(2**62, 0, names[0]))  # more than there are batches
        (minus_first,) = max_over_ranks([-number], device)
        (place,) = max_over_ranks([names.index(layer) if number == -minus_first else -1], device)
        return -minus_first, names[place]


def _result(
    statistics: dict[str, LayerStatistics],
    layers: Mapping[str, _BatchNorm],
    totals: _Totals,
    left_out: tuple[int, str] | None,
    joint: JointBatches | None,
    profile: ModelProfile,
) -> PopulationStatistics:
    """Put the result together, or raise, on every rank alike, if a layer could not normalize with its statistics."""
    if left_out is not None:
        number, layer = left_out
        if not statistics:
            raise ValueError(
                f"Layer {layer!r} received non-finite values, or values whose squares overflow, in every batch, so no "
                "statistics were written. Look at the batches and the weights."
            )
        others = f", and so are {totals.left_out - 1} others" if totals.left_out > 1 else ""
        message = f"Batch {number} of a pass over data is left out of the statistics{others}: it gives layer {layer!r} "
        warn_once(profile, "left out", message + "non-finite values, or values whose squares overflow.")
    if not statistics:
        raise ValueError(
            f"No batch reached a BatchNorm layer of {', '.join(layers)} in a way that training would track (in train "
            "mode, with track_running_stats and a momentum other than 0): is the iterable of batches empty, or does "
            "the forward bypass the layers?"
        )
    for name, values in statistics.items():
        if values.count < 2:
            what = f"Layer {name!r} received one value per channel in all, which has no variance"
            raise ValueError(f"{what}, so no statistics were written: pass more samples.")
    if any(STATISTICS[0] in layer._buffers for layer in layers.values()):
        statistics = _with_domains(statistics, layers)
    spilled, batch_size = joint.pooled.spilled if joint else 0, totals.samples / totals.normalizations
    return PopulationStatistics(statistics, totals.samples, totals.batches, batch_size, spilled, totals.left_out)


def _max_standard_error(statistics: Mapping[str, LayerStatistics]) -> float:
    if any(s.calls < 2 for s in statistics.values()):
        return inf  # a single call gives no error estimate
    errors = [e for s in statistics.values() for e in (s.standard_error, s.var_standard_error)]
    # a channel without variance has no error either: 0/0
    squares = [e.nan_to_num(0.0, posinf=0.0).square().mean() for e in errors]
    return float(torch.stack(squares).amax().sqrt()) if squares else inf


def _accumulator(layers: Mapping[str, _BatchNorm]) -> Accumulator:
    means = {name: cast(Tensor, layer._buffers["running_mean"]) for name, layer in layers.items()}
    channels = {}
    for name, mean in means.items():
        channels[name] = len(mean)
        domains = num_domains(layers[name]) if STATISTICS[0] in layers[name]._buffers else 0
        channels |= {of_domain(name, domain): len(mean) for domain in range(domains)}
    first = next(iter(means.values()))
    return Accumulator(channels, first.device, torch.promote_types(first.dtype, torch.float32))


def _with_domains(
    statistics: Mapping[str, LayerStatistics], layers: Mapping[str, _BatchNorm]
) -> dict[str, LayerStatistics]:
    merged = {}
    for name, layer in layers.items():
        domains = tuple([statistics.get(of_domain(name, domain)) for domain in range(num_domains(layer))])
        reached = [d for d in domains if d is not None]
        if name in statistics or reached:
            whole = statistics[name] if name in statistics else LayerStatistics.merge(reached)
            merged[name] = replace(whole, domains=domains) if domains else whole
    return merged
