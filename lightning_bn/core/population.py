"""Population statistics: the moments of all inputs of each layer of a fixed model.

One merge adds a batch for all layers, because their moments lie in one long vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_bn.core.gaps import gaps_of_layers
from lightning_bn.core.moments import Moments
from lightning_bn.core.ranks import merge_over_ranks, sum_over_ranks


@dataclass(frozen=True)
class LayerStatistics:
    """Holds the population statistics of one layer's inputs.

    Attributes:
        mean: Mean of each channel over all batches, ``(C,)`` float64.
        var: Biased variance of each channel over all batches, between-batch variance included, ``(C,)`` float64.
        count: Values per channel (rows x space).
        calls: Number of the layer's calls.
        standard_error: Standard error of ``mean`` in sigma, ``(C,)``, from the spread of the calls' means; NaN for one.
        var_standard_error: Relative standard error of ``var``, ``(C,)``, from the spread of the calls' mean squared
            deviations; NaN for one call.
        domains: Statistics per domain, if the layer keeps them (`domain_bn`); None for a domain without inputs.
            ``mean`` and ``var`` then weight each domain by its count.
    """

    mean: Tensor
    var: Tensor
    count: int
    calls: int
    standard_error: Tensor
    var_standard_error: Tensor
    domains: tuple[LayerStatistics | None, ...] = ()

    @classmethod
    def merge(cls, parts: Sequence[LayerStatistics]) -> LayerStatistics:
        """Merge the statistics of all parts."""
        count = sum(p.count for p in parts)
        pooled = Moments.merge([Moments(p.mean.new_tensor(float(p.count)), p.mean, p.var * p.count) for p in parts])
        mean_errors = torch.stack([p.count / count * p.standard_error * p.var.sqrt() for p in parts])
        var_errors = torch.stack([p.count / count * p.var_standard_error * p.var for p in parts])
        errors = mean_errors.norm(dim=0) / pooled.var.sqrt(), var_errors.norm(dim=0) / pooled.var
        return cls(pooled.mean, pooled.var, count, sum(p.calls for p in parts), *errors)


class PopulationStatistics(dict[str, LayerStatistics]):
    """Maps the name of each layer that was called to its [`LayerStatistics`][lightning_bn.LayerStatistics].

    Attributes:
        num_samples: Samples of all ranks.
        num_batches: Batches of all ranks.
        batch_size: Samples that were normalized jointly, on average: B of the paper's Table 2.
        left_out: Batches of all ranks that are not included, because a layer received non-finite values.
        spilled: Bytes that this rank moved to the host's memory or to disk.

    Example:
        >>> import torch
        >>> from lightning_bn import precise_bn
        >>> statistics = precise_bn(torch.nn.Sequential(torch.nn.BatchNorm1d(2)), [torch.zeros(8, 2), torch.ones(8, 2)])
        >>> statistics.num_samples, statistics["0"].mean
        (16, tensor([0.5000, 0.5000], dtype=torch.float64))
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
        super().__init__(layers)
        self.num_samples, self.num_batches = num_samples, num_batches
        self.batch_size, self.spilled, self.left_out = batch_size, spilled, left_out

    def gaps_to(self, other: PopulationStatistics) -> dict[str, tuple[float, float]]:
        """Return the mean gap and variance gap of each layer, in units of the ``other`` statistics.

        To see if B matters: ``precise_bn(..., normalization_batch_size="population").gaps_to(one_pass)``.
        """
        names = [name for name in self if name in other]
        own, others = ([(s[name].mean, s[name].var) for name in names] for s in (self, other))
        return dict(zip(names, gaps_of_layers(own, others), strict=True))

    def __reduce__(self) -> tuple[object, ...]:
        sizes = self.num_samples, self.num_batches, self.batch_size, self.spilled, self.left_out
        return type(self), (dict(self), *sizes)

    def __repr__(self) -> str:
        return f"PopulationStatistics({len(self)} layers, {self.num_samples} samples in {self.num_batches} batches)"


@dataclass(eq=False)
class Slots:
    """Holds the memory for the statistics of one layer's calls within a batch.

    Attributes:
        views: Mean and *unbiased* variance of the n-th call, ``(C,)`` each: a batch-norm kernel fills them as running
            statistics with momentum 1.
        counts: Values per channel of the calls so far.
        is_reached: Whether the layer was called in any batch.
        accurate_count: Largest count at which the kernel was accurate on this layer's inputs.
    """

    views: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    is_reached: bool = False
    accurate_count: int = 0


class Accumulator:
    """Adds up the statistics of every call of every layer, without waiting for the device before the end.

    A batch in which a layer received non-finite values is left out, of all layers. Float64 sums around the mean of a
    layer's first call keep the variance from being a difference of much larger sums.

    Example:
        >>> accumulator = Accumulator({"bn": 1})
        >>> for mean, unbiased_var, count in ((1.0, 0.0, 2), (4.0, 0.0, 1)):
        ...     slot = accumulator.slot("bn", count)
        ...     slot[0].fill_(mean), slot[1].fill_(unbiased_var)
        ...     accumulator.end_of_batch()
        (tensor([1.]), tensor([0.]))
        (tensor([4.]), tensor([0.]))
        >>> accumulator.statistics()[0]["bn"].mean
        tensor([2.], dtype=torch.float64)
    """

    def __init__(
        self, channels: Mapping[str, int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.channels, self.slots = dict(channels), {name: Slots() for name in channels}
        self.order: list[Slots] = []
        self.dtype, self._scratch_device = dtype, torch.device(device)
        self.device = torch.device("cpu" if self._scratch_device.type == "mps" else device)
        sizes = torch.tensor(list(channels.values()))
        # copies to a device do not wait for it with non_blocking
        layers = torch.arange(len(sizes)).repeat_interleave(sizes, output_size=sum(channels.values()))
        self._layers = layers.to(self.device, non_blocking=True)
        total = torch.zeros(10, len(self._layers), dtype=torch.float64, device=self.device)
        self._pivot, self._cross = total[:2]
        # rows: of a call's mean d from the pivot, and of its mean square q around it; weighted by count, or its square
        self._row, self._sum, self._squared_weight_sum, self._square_sum = total[2:].split(2)
        self._weighted_row = torch.zeros_like(self._row)
        self._weights: tuple[tuple[int, ...], Tensor, Tensor, Tensor] | None = None
        self._places, self._num_placed = torch.full_like(self._layers, len(sizes)), 0
        self._no_place = torch.full((), len(sizes), device=self.device)
        self._batches: list[tuple[Tensor, list[tuple[int, ...]]]] = []  # place of the first bad layer; counts of calls
        self._scratch: list[Tensor] = []
        self._add_scratch()

    def _add_scratch(self) -> None:
        sizes = list(self.channels.values())
        self._scratch.append(torch.zeros(2, sum(sizes), dtype=self.dtype, device=self._scratch_device))
        means, variances = (row.split(sizes) for row in self._scratch[-1])
        for slots, *views in zip(self.slots.values(), means, variances, strict=True):
            slots.views.append((views[0], views[1]))

    def slot(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """Return where to write mean and *unbiased* variance, ``(C,)``, of a layer's next call of ``count`` values."""
        slots = self.slots[name]
        if len(slots.counts) == len(slots.views):
            self._add_scratch()
        if not slots.is_reached:
            slots.is_reached = True
            self.order.append(slots)
        slots.counts.append(count)
        return slots.views[len(slots.counts) - 1]

    def end_of_batch(self) -> None:
        """Add the slots filled since the last batch: first calls of all layers at once, then second calls."""
        layers = list(self.slots.values())
        filled = self._scratch[: max([len(slots.counts) for slots in layers])]
        is_new, known = len(self.order) > self._num_placed, self._places
        if is_new:
            self._num_placed, place = len(self.order), {id(slots): i for i, slots in enumerate(self.order)}
            places = torch.tensor([place.get(id(slots), len(layers)) for slots in layers])
            self._places = places.to(self.device, non_blocking=True)[self._layers]
        first_bad = self._no_place
        for scratch in filled:
            is_finite = scratch.sum(0).to(self.device).isfinite()
            first_bad = torch.minimum(first_bad, torch.where(is_finite, self._no_place, self._places).amin())
        is_bad = first_bad < len(layers)
        counts = [tuple([s.counts[call] if len(s.counts) > call else 0 for s in layers]) for call in range(len(filled))]
        for scratch, sizes in zip(filled, counts, strict=True):
            mean, var = scratch.to(self.device)
            if is_new and scratch is filled[0]:
                is_first = (self._places < len(layers)) & (known == len(layers)) & mean.isfinite()
                self._pivot.copy_(torch.where(is_first, mean.double(), self._pivot))
            self._add(mean, var, sizes, is_bad)
            scratch.zero_()  # momentum 1 would keep an old NaN: 0 * NaN
        self._batches.append((first_bad, counts))
        for slots in layers:
            slots.counts.clear()

    def _add(self, mean: Tensor, var: Tensor, counts: tuple[int, ...], is_bad: Tensor) -> None:
        if self._weights is None or self._weights[0] != counts:  # most batches equal the one before
            count = torch.tensor(counts, dtype=torch.float64).to(self.device, non_blocking=True)[self._layers]
            self._weights = counts, count, count.square(), (count - 1).clamp_(min=0) / count.clamp(min=1)
        _, count, squared_count, to_biased = self._weights
        torch.sub(mean, self._pivot, out=self._row[0])
        torch.mul(var, to_biased, out=self._row[1])
        self._row[1].addcmul_(self._row[0], self._row[0])
        self._row.masked_fill_(is_bad, 0.0)
        self._sum.addcmul_(self._row, count)
        torch.mul(self._row, squared_count, out=self._weighted_row)
        self._squared_weight_sum.add_(self._weighted_row)
        self._square_sum.addcmul_(self._weighted_row, self._row)
        self._cross.addcmul_(self._weighted_row[0], self._row[1])

    def statistics(self) -> tuple[dict[str, LayerStatistics], dict[int, str]]:
        """Return the statistics of all ranks so far (a collective), and this rank's batches that were left out.

        The latter map the number of an `end_of_batch` to the first layer that received non-finite values.
        """
        first_bad = torch.stack([self._no_place, *[place for place, _ in self._batches]]).tolist()[1:]
        layers, names = len(self.slots), {id(slots): name for name, slots in self.slots.items()}
        left_out = {batch: names[id(self.order[place])] for batch, place in enumerate(first_bad) if place < layers}
        calls = [
            c for place, (_, calls) in zip(first_bad, self._batches, strict=True) if place == layers for c in calls
        ]
        kept = list(Counter(calls).items())
        counts = [sum([c[layer] * n for c, n in kept]) for layer in range(layers)]
        squares = [sum([c[layer] ** 2 * n for c, n in kept]) for layer in range(layers)]
        numbers = [sum([n for c, n in kept if c[layer]]) for layer in range(layers)]
        weights = torch.tensor([counts, squares], dtype=torch.float64)
        host = sum_over_ranks([*counts, *numbers], self.device)
        count, weight = weights.to(self.device, non_blocking=True)[:, self._layers]
        shift = self._sum[0] / count.clamp(min=1)
        m2 = (self._sum[1] - self._sum[0] * shift).clamp_(min=0)
        values = merge_over_ranks(Moments(count, self._pivot + shift, m2))
        # The squared error of a weighted mean is the sum of the squared, weighted deviations. A call's mean square
        # around the population's mean, less the variance, is q - 2 e d + e^2 - var.
        mean, var = values.mean, values.var
        e, (d, q), (dd, qq), dq = mean - self._pivot, self._squared_weight_sum, self._square_sum, self._cross
        rest = e.square() - var
        of_mean = dd - 2 * e * d + e.square() * weight
        of_var = qq - 4 * e * dq + 4 * e.square() * dd + 2 * rest * (q - 2 * e * d) + rest.square() * weight
        sums = torch.stack([of_mean, of_var]).clamp_(min=0)
        errors = merge_over_ranks(Moments(weight, torch.zeros_like(sums), sums)).m2 / values.count.square()
        calls_of = torch.tensor(host[layers:], dtype=torch.float64).to(self.device, non_blocking=True)[self._layers]
        errors *= (calls_of / (calls_of - 1)).where(calls_of > 1, torch.nan)  # a single call has no spread
        errors = torch.stack([errors[0] / var, errors[1] / var.square()]).sqrt_()
        sizes = list(self.channels.values())
        per_layer = zip(host[:layers], host[layers:], *(v.split(sizes, -1) for v in (mean, var, *errors)), strict=True)
        return {
            name: LayerStatistics(m.clone(), v.clone(), count, number, mean_error.clone(), var_error.clone())
            for name, (count, number, m, v, mean_error, var_error) in zip(self.slots, per_layer, strict=True)
            if number
        }, left_out
