"""Population statistics: the moments of all batches a fixed model was shown, layer by layer.

Batches are added up with one fused merge each: the moments of all layers lie side by side in one long vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.statistics.gaps import mean_gap, var_gap
from lightning_bn.statistics.moments import Moments


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer was shown.

    Attributes:
        mean: Mean of each channel over all batches, ``(C,)`` float64.
        var: Biased variance of each channel over all batches, between-batch variance included, ``(C,)`` float64.
        count: Values per channel (rows x space) that went into them.
        calls: How often the layer was called.
        standard_error: Standard error of ``mean`` in units of sigma, ``(C,)``, from the spread of the calls' own
            means; NaN when there was a single call.
        var_standard_error: Standard error of ``var`` relative to it, ``(C,)``, from the spread of the calls' mean
            squared deviations; likewise.
        domains: What it was shown of each domain, if it keeps statistics of domains (`domain_bn`): None for one of
            which it was shown nothing. ``mean`` and ``var`` are then of all of them, each weighing by its values.
    """

    mean: Tensor
    var: Tensor
    count: int
    calls: int
    standard_error: Tensor
    var_standard_error: Tensor
    domains: tuple[LayerStatistics | None, ...] = ()


def together(parts: Sequence[LayerStatistics]) -> LayerStatistics | None:
    """What a layer was shown, from what it was shown in several parts; None if there are none."""
    if not parts:
        return None
    count = sum(p.count for p in parts)
    pooled = Moments.empty(len(parts[0].mean), parts[0].mean.device)
    for p in parts:
        pooled += Moments(p.mean.new_tensor(float(p.count)), p.mean, p.var * p.count)
    mean_errors = torch.stack([p.count / count * p.standard_error * p.var.sqrt() for p in parts])
    var_errors = torch.stack([p.count / count * p.var_standard_error * p.var for p in parts])
    errors = mean_errors.norm(dim=0) / pooled.var.sqrt(), var_errors.norm(dim=0) / pooled.var
    return LayerStatistics(pooled.mean, pooled.var, count, sum(p.calls for p in parts), *errors)


class PopulationStatistics(Mapping[str, LayerStatistics]):
    """Qualified layer name -> [`LayerStatistics`][lightning_bn.LayerStatistics], for the layers that were reached.

    Attributes:
        num_samples: Samples seen, those of all ranks together.
        num_batches: Batches seen, likewise.
        batch_size: Samples that were normalised together, on average: B of the paper's Table 2.
        spilled: Bytes that were put to the host's memory or to disk on the way, on this rank.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerStatistics],
        num_samples: int,
        num_batches: int,
        batch_size: float,
        spilled: int = 0,
    ) -> None:
        self._layers = dict(layers)
        self.num_samples, self.num_batches = num_samples, num_batches
        self.batch_size, self.spilled = batch_size, spilled

    def gaps_to(self, other: PopulationStatistics) -> dict[str, tuple[float, float]]:
        """How far these lie from other statistics of the same layers: mean gap and variance gap of each.

        So whether B matters for the model at hand: ``precise_bn(..., batch_size="population").gaps_to(one_pass)``.
        """
        return {
            name: (
                float(mean_gap(own.mean, other[name].mean, other[name].var)),
                float(var_gap(own.var, other[name].var)),
            )
            for name, own in self.items()
            if name in other
        }

    def __getitem__(self, name: str) -> LayerStatistics:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"PopulationStatistics({len(self)} layers, {self.num_samples} samples in {self.num_batches} batches)"


class Accumulator:
    """Adds up the statistics of every call of every layer, all layers side by side in one vector.

    A call's statistics are written, by whoever has them, into a *slot*: two scratch tensors that a batch-norm kernel
    can fill as if they were running statistics.

    Attributes:
        values: Moments of the layers' values.
        spread: Moments of the calls' own means, and behind them of their mean squared deviations from the population's
            mean so far; each weighted by its squared count, since the squared error of a weighted mean is the sum of
            the squared, weighted deviations.
        calls: Layer name -> number of calls.

    Example:
        >>> seen = Accumulator({"bn": 1})
        >>> for mean, unbiased_var, count in ((1.0, 0.0, 2), (4.0, 0.0, 1)):
        ...     slot = seen.slot("bn", count)
        ...     slot[0].fill_(mean), slot[1].fill_(unbiased_var)
        ...     seen.end_of_batch()
        (tensor([1.]), tensor([0.]))
        (tensor([4.]), tensor([0.]))
        >>> seen.statistics()["bn"].mean
        tensor([2.], dtype=torch.float64)
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._channels = dict(channels)
        self._empty = torch.empty(0, device=device, dtype=dtype)
        self._rounds: list[_Round] = []
        # not every device has float64
        total = sum(channels.values())
        self.home = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.values, self.spread = Moments.empty(total, self.home), Moments.empty(2 * total, self.home)
        self.calls = dict.fromkeys(channels, 0)

    def slot(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """Where to put mean and *unbiased* variance, ``(C,)`` each, of a layer's next call, of ``count`` values."""
        self.calls[name] += 1
        for calls in self._rounds:
            if name not in calls.counts:
                break
        else:
            calls = _Round.of(self._channels, self._empty.new_zeros(2, sum(self._channels.values())))
            self._rounds.append(calls)
        calls.counts[name] = count
        return calls.means[name], calls.variances[name]

    def end_of_batch(self) -> None:
        """Merge the slots filled since the last batch: first calls of all layers at once, then second calls."""
        for calls in self._rounds:
            if not calls.counts:
                break
            count = torch.tensor([float(calls.counts.get(name, 0)) for name in self._channels], dtype=torch.float64)
            count = count.repeat_interleave(torch.tensor(list(self._channels.values()))).to(self.home)
            mean, var = calls.scratch.to(self.home).double()
            own = Moments(count, mean, var * (count - 1).clamp(min=0))
            self.values += own
            squared = own.var + (mean - self.values.mean).square()
            values = torch.cat([mean, squared])
            self.spread += Moments(count.square().repeat(2), values, torch.zeros_like(values))
            calls.counts.clear()

    def statistics(self) -> dict[str, LayerStatistics]:
        """What each layer was shown, layers that were not called left out."""
        mean, var, count = self.values.mean, self.values.var, self.values.count
        around = self.spread.mean - torch.cat([mean, var])
        squared = (self.spread.m2 + self.spread.count * around.square()).view(2, -1) / count.square()
        sizes = list(self._channels.values())
        per_layer = zip(*(v.split(sizes, -1) for v in (mean, var, count, squared)), strict=True)
        found = {}
        for (name, calls), (m, v, n, (of_mean, of_var)) in zip(self.calls.items(), per_layer, strict=True):
            if calls:
                correction = calls / (calls - 1) if calls > 1 else torch.nan
                errors = (of_mean * correction / v).sqrt(), (of_var * correction).sqrt() / v
                found[name] = LayerStatistics(m.clone(), v.clone(), int(n[0]), calls, *errors)
        return found


@dataclass(frozen=True)
class _Round:
    """Slots for one call of every layer."""

    scratch: Tensor
    means: dict[str, Tensor]
    variances: dict[str, Tensor]
    counts: dict[str, int]

    @classmethod
    def of(cls, channels: Mapping[str, int], scratch: Tensor) -> _Round:
        means, variances = (dict(zip(channels, row.split(list(channels.values())), strict=True)) for row in scratch)
        return cls(scratch, means, variances, {})
