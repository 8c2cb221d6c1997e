r"""The leakage test: compares the rows of normalization batches with random groups (paper, Sec. 6).

Rows are means over space. Each layer's rows are projected on their leading principal components, of variance one each.
With $k$ groups of $m_1 \dots m_k$ of the $n$ rows, and $B$ and $W$ the sums of squares between and within groups over
all components, the intra-class correlation is

$$MS_B = \frac{B}{k - 1}, \quad MS_W = \frac{W}{n - k}, \quad m = \frac{n - \sum m_j^2 / n}{k - 1}, \quad
ICC = \frac{MS_B - MS_W}{MS_B + (m - 1) MS_W}.$$

It is 0 for random groups, 1 for groups of equal rows, $-1 / (m - 1)$ for groups of equal means. `permutation_test`
compares $\max_l \sqrt{d_l} \, |\log(MS_B / MS_W)_l|$ over layers $l$ of $d_l$ components with random regroupings.
`EProcess` combines the p-values of a run's epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_COMPONENTS = 16
"""With 8 the test was weaker (batches of 16 classes x 2, of 80 classes of digits), with 32 and 64 not stronger."""
_MAX_EXTREME = 10
"""Stop after this many regroupings at least as extreme (Besag and Clifford, 1991)."""
_MAX_SUMS = 2**23
"""Sums of groups computed at once: 64 MiB."""
_ROUNDING = 1e-12
"""Smaller fractions of a sum of squares count as zero."""
_MIN_SPREAD = 1e-5
"""A smaller standard deviation, relative to the largest value, may be float32 rounding of equal rows: about 80
roundings, as in sums of thousands of products. They depend on a row's position in the batch."""
_EXPONENT = 1 / 8
"""Exponent of the bets in `EProcess`: small, so that one epoch with the smallest p-value suffices."""


def leading_components(rows: Tensor, most: int = _MAX_COMPONENTS, eps: float = 0.0) -> Tensor:
    """Leading principal components ``(n, d)`` of rows ``(n, C)``, after each channel is scaled to variance one.

    Each has mean 0 and sum of squares 1. Channels that differ only by rounding, in the machine precision ``eps`` of the
    rows or in float32, are left out; ``d`` is 0 if all are.
    """
    x = rows.double()
    rounding = max(_MIN_SPREAD, eps) * x.abs().amax(0) if len(x) else 0
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    differs = scale > rounding
    x = x[:, differs] / scale[differs]
    n, channels = x.shape
    wide = channels > n
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    largest = values[-1:].clamp(min=0).repeat(len(values))
    # At most half as many components as rows: with n - 1 of them every grouping would explain the same share.
    leading = (values > 1e-10 * largest).nonzero()[:, 0].flip(0)[: min(most, max((n - 1) // 2, 1))]
    components: Tensor = vectors[:, leading] if wide else x @ vectors[:, leading] / values[leading].sqrt()
    return components


def icc(components: Tensor, groups: Tensor) -> float:
    """Intra-class correlation of rows over all components ``(n, d)``, each of mean 0, in groups ``(n,)``."""
    sizes, x = _sizes(groups), components.double()
    between = _between(x, groups.argsort().unsqueeze(0), sizes).sum()
    within = (x.square().sum() - between).clamp(min=0)
    ms_between, ms_within = float(between) / (len(sizes) - 1), float(within) / (len(groups) - len(sizes))
    return (ms_between - ms_within) / (ms_between + (_typical_size(sizes) - 1) * ms_within)


def icc_noise(components: Tensor, groups: Tensor) -> float:
    """Standard deviation of `icc` over random groups, for approximately normal rows."""
    sizes = _sizes(groups)
    k, n, d = len(sizes), int(sizes.sum()), components.shape[1]
    return float((2 / d * (1 / (k - 1) + 1 / (n - k))) ** 0.5 / _typical_size(sizes))


def comparable(components: Tensor, groups: Tensor) -> bool:
    """Return whether rows differ, and there are two groups or more, one of them of two rows or more."""
    return components.shape[1] > 0 and 1 < len(groups.unique()) < len(groups)


def permutation_test(layers: Sequence[Tensor], groups: Tensor, permutations: int = 19_999, seed: int = 0) -> float:
    """Probability that random groups of the same sizes are at least as extreme, in the most extreme layer.

    It is exact: under random grouping it is at most p in at most a fraction p of tests. Row i of the components of each
    layer is the same sample and keeps its place, so layers may depend on each other in any way.
    """
    rows = torch.cat(list(layers), 1)
    sizes, widths = _sizes(groups), [layer.shape[1] for layer in layers]
    observed = _most_extreme(rows, groups.argsort().unsqueeze(0), sizes, widths)
    generator = torch.Generator().manual_seed(seed)
    drawn, extreme, at_once = 0, 0, 25
    while drawn < permutations:
        at_once = min(at_once, permutations - drawn, max(1, _MAX_SUMS // (len(sizes) * rows.shape[1])))
        orders = torch.stack([torch.randperm(len(rows), generator=generator) for _ in range(at_once)])
        # Ties count as extreme, so allow for another order of summation.
        found = _most_extreme(rows, orders, sizes, widths) >= observed * (1 - 1e-9)
        so_far = extreme + found.cumsum(0)
        if so_far[-1] >= _MAX_EXTREME:
            return _MAX_EXTREME / (drawn + 1 + int((so_far >= _MAX_EXTREME).nonzero()[0]))
        drawn, extreme = drawn + at_once, int(so_far[-1])
        at_once *= 2
    return (1 + extreme) / (1 + drawn)


def _most_extreme(rows: Tensor, orders: Tensor, sizes: Tensor, widths: list[int]) -> Tensor:
    """The test statistic for P orders of the rows, ``(P, n)``: the first rows are group 0, the next group 1, ..."""
    k, n = len(sizes), len(rows)
    found = []
    for between, width in zip(_between(rows, orders, sizes).split(widths, 1), widths, strict=True):
        # Clamped, so that groups of equal rows, or of equal means, tie whatever the rounding.
        b = between.sum(1).clamp(_ROUNDING * width, (1 - _ROUNDING) * width)
        found.append(width**0.5 * ((b / (k - 1)).log() - ((width - b) / (n - k)).log()).abs())
    return torch.stack(found).amax(0)


def _between(rows: Tensor, orders: Tensor, sizes: Tensor) -> Tensor:
    """Sums of squares between the groups of each order, ``(P, d)``."""
    starts = sizes.cumsum(0) - sizes + len(rows) * torch.arange(len(orders)).unsqueeze(1)
    # embedding_bag sums the rows of a group without gathering them: 10 times as fast
    sums = F.embedding_bag(orders.flatten(), rows, starts.flatten(), mode="sum")
    return (sums.view(len(orders), len(sizes), -1).square() / sizes.view(-1, 1)).sum(1)


def _sizes(groups: Tensor) -> Tensor:
    sizes: Tensor = groups.unique(return_counts=True)[1]
    return sizes


def _typical_size(sizes: Tensor) -> float:
    n = float(sizes.sum())
    return (n - float(sizes.square().sum()) / n) / (len(sizes) - 1)


@dataclass
class EProcess:
    r"""Combines the p-values of a run's epochs; valid at any time (a sequential test).

    Each p-value is a bet $f(p) = p^{-7/8} / 8$, whose mean without leakage is at most 1. A share $1 / (s (s + 1))$ of a
    capital of 1 is bet from epoch $s$ on, so late leaks are found as well:

    $$E_t = \frac{1}{t + 1} + \sum_{s \le t} \frac{1}{s (s + 1)} \prod_{u = s}^{t} f(p_u).$$

    Without leakage the capital ever reaches $1 / \alpha$ in at most a fraction $\alpha$ of runs (Ville's inequality).
    So the run's p-value, which never rises, is one over the largest capital so far.
    """

    epochs: int = 0
    staked: float = 0.0  # the sum in the formula
    largest: float = 1.0

    def add(self, p_value: float) -> None:
        self.epochs += 1
        share = 1 / (self.epochs * (self.epochs + 1))
        self.staked = (self.staked + share) * _EXPONENT * p_value ** (_EXPONENT - 1)
        self.largest = max(self.largest, self.staked + 1 / (self.epochs + 1))

    @property
    def p_value(self) -> float:
        return 1 / self.largest
