"""Population statistics: the moments of all batches a fixed model was shown, layer by layer.

Batches are added up with one fused merge each: the moments of all layers lie side by side in one long vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.core.gaps import mean_gap, var_gap
from lightning_bn.core.moments import Moments


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
        batch_size: Samples that were normalized together, on average: B of the paper's Table 2.
        left_out: Batches, of all ranks, that are in none of these because a layer received non-finite values.
        spilled: Bytes that were put to the host's memory or to disk on the way, on this rank.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerStatistics],
        num_samples: int,
        num_batches: int,
        batch_size: float,
        spilled: int = 0,
        left_out: int = 0,
    ) -> None:
        self._layers = dict(layers)
        self.num_samples, self.num_batches = num_samples, num_batches
        self.batch_size, self.spilled, self.left_out = batch_size, spilled, left_out

    def gaps_to(self, other: PopulationStatistics) -> dict[str, tuple[float, float]]:
        """How far these lie from other statistics of the same layers: mean gap and variance gap of each.

        So whether B matters for the model at hand: ``precise_bn(..., normalization_batch_size="population").gaps_to(one_pass)``.
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
    can fill as if they were running statistics. A batch of which a layer received non-finite values is left out, of
    all layers; whether there was one is asked of the device once, at the end.

    Attributes:
        channels: Layer name -> number of its channels.
        values: Moments of the layers' values.
        spread: Moments, ``(2, C)``, of the calls' own means and of their mean squared deviations from the population's
            mean so far; each weighted by its squared count, since the squared error of a weighted mean is the sum of
            the squared, weighted deviations.

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
        self.channels = dict(channels)
        self._empty = torch.empty(0, device=device, dtype=dtype)
        self._rounds: list[_Round] = []
        # not every device has float64
        self.home = torch.device("cpu" if torch.device(device).type == "mps" else device)
        total = sum(channels.values())
        self.values = Moments.empty(total, self.home)
        self._no_m2 = torch.zeros(2, total, dtype=torch.float64, device=self.home)
        self.spread = Moments(self.values.count, self._no_m2, self._no_m2)
        self._calls = self.values.count
        self._order: dict[str, None] = {}
        self._nowhere = torch.full((), len(channels), device=self.home)
        self._places = self._nowhere
        self._first_bad: list[Tensor] = []

    def slot(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """Where to put mean and *unbiased* variance, ``(C,)`` each, of a layer's next call, of ``count`` values."""
        for calls in self._rounds:
            if name not in calls.counts:
                break
        else:
            calls = _Round.of(self.channels, self._empty.new_zeros(2, sum(self.channels.values())))
            self._rounds.append(calls)
        calls.counts[name] = count
        return calls.means[name], calls.variances[name]

    def end_of_batch(self) -> None:
        """Merge the slots filled since the last batch, first calls of all layers at once, then second calls."""
        rounds = [r for r in self._rounds if r.counts]
        self._update_places(rounds)
        first_bad = self._nowhere
        for calls in rounds:
            bad = torch.where(calls.scratch.sum(0).to(self.home).isfinite(), self._nowhere, self._places).amin()
            first_bad = bad if first_bad is self._nowhere else torch.minimum(first_bad, bad)
        keep = first_bad == self._nowhere
        for calls in rounds:
            mean, var = calls.scratch.to(self.home).double().nan_to_num_(0.0, 0.0, 0.0)
            values, degrees, per_value = calls.counts_of_channels(self.channels, self.home)
            count = values * keep
            self.values += Moments(count, mean, var * degrees * keep)
            squared = (var * per_value).addcmul_(delta := mean - self.values.mean, delta)
            self.spread += Moments(count.square(), torch.stack([mean, squared]), self._no_m2)
            self._calls = self._calls + (count > 0)
        self._first_bad.append(first_bad)
        self.discard()

    def discard(self) -> None:
        """Empty the slots filled since the last batch."""
        for calls in self._rounds:
            if calls.counts:
                calls.counts.clear()
                calls.scratch.zero_()  # momentum 1 keeps a NaN that is there: 0 * NaN

    def _update_places(self, rounds: Sequence[_Round]) -> None:
        """Know the place of each channel's layer in the order of the layers' first calls."""
        new = [name for calls in rounds for name in calls.counts if name not in self._order]
        if new:
            self._order.update(dict.fromkeys(new))
            place = {name: i for i, name in enumerate(self._order)}
            places = torch.tensor([place.get(name, len(self.channels)) for name in self.channels])
            self._places = places.repeat_interleave(torch.tensor(list(self.channels.values()))).to(self.home)

    def nonfinite(self) -> dict[int, str]:
        """Batches that were left out, by the number of their `end_of_batch`, and the first layer of each."""
        places = torch.stack(self._first_bad).tolist() if self._first_bad else []
        order = list(self._order)
        return {batch: order[place] for batch, place in enumerate(places) if place < len(self.channels)}

    @property
    def calls(self) -> dict[str, int]:
        """Layer name -> number of calls that count."""
        first, *others = [*self.channels.values()] or [0]
        ends = torch.tensor([first, *others]).cumsum(0) - 1
        return dict(zip(self.channels, self._calls.cpu()[ends].int().tolist(), strict=True))

    def statistics(self, calls: Mapping[str, int] | None = None) -> dict[str, LayerStatistics]:
        """What each layer was shown, layers that were not called left out.

        Args:
            calls: Those of all ranks, if `values` and `spread` are.
        """
        mean, var, count = self.values.mean, self.values.var, self.values.count
        around = self.spread.mean - torch.stack([mean, var])
        squared = (self.spread.m2 + self.spread.count * around.square()) / count.square()
        sizes = list(self.channels.values())
        per_layer = zip(*(v.split(sizes, -1) for v in (mean, var, count, squared)), strict=True)
        found = {}
        calls = self.calls if calls is None else calls
        for (name, number), (m, v, n, (of_mean, of_var)) in zip(calls.items(), per_layer, strict=True):
            if number:
                correction = number / (number - 1) if number > 1 else torch.nan
                errors = (of_mean * correction / v).sqrt(), (of_var * correction).sqrt() / v
                found[name] = LayerStatistics(m.clone(), v.clone(), int(n[0]), number, *errors)
        return found


@dataclass
class _Round:
    """Slots for one call of every layer."""

    scratch: Tensor
    means: dict[str, Tensor]
    variances: dict[str, Tensor]
    counts: dict[str, int]
    _known: tuple[dict[str, int], tuple[Tensor, Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, channels: Mapping[str, int], scratch: Tensor) -> _Round:
        means, variances = (dict(zip(channels, row.split(list(channels.values())), strict=True)) for row in scratch)
        return cls(scratch, means, variances, {})

    def counts_of_channels(self, channels: Mapping[str, int], home: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Values of each channel in this round, one less, and the ratio of that to the values, ``(C,)`` each.

        Most batches are as large as the one before, and need no new tensors.
        """
        if self._known is None or self._known[0] != self.counts:
            count = torch.tensor([float(self.counts.get(name, 0)) for name in channels], dtype=torch.float64)
            count = count.repeat_interleave(torch.tensor(list(channels.values()))).to(home)
            degrees = (count - 1).clamp(min=0)
            self._known = dict(self.counts), (count, degrees, degrees / count.clamp(min=1))
        return self._known[1]
