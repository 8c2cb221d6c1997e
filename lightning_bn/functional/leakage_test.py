r"""Leakage: whether the rows of a normalization batch are more alike, or less, than random ones (paper, Sec. 6).

Of a layer's rows, each its mean over space, the leading principal components are taken, each of variance one. With
$k$ groups of $m_1 \dots m_k$ of the $n$ rows, and $B$ and $W$ the sums of squares between and within groups, over all
components,

$$MS_B = \frac{B}{k - 1}, \quad MS_W = \frac{W}{n - k}, \quad m = \frac{n - \sum m_j^2 / n}{k - 1}, \quad
ICC = \frac{MS_B - MS_W}{MS_B + (m - 1) MS_W}$$

is the intra-class correlation of analysis of variance: 0 for groups put together at random, 1 for groups of equal rows,
$-1 / (m - 1)$ for groups of equal means. `permutation_test` holds several layers against random regrouping at once, and
`EProcess` puts the p-values of all epochs of a run together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_COMPONENTS = 16
"""8 found less (normalization batches of 16 classes x 2, of 80 classes of digits), 32 and 64 no more."""

_ENOUGH = 10
"""Regroupings at least as extreme, after which no more are drawn: p is then known to a third of itself."""

_SUMS_AT_ONCE = 2**23
"""64 MiB."""

_ROUNDING = 1e-12
"""Shares of a sum of squares that are none."""

_NO_SPREAD = 1e-5
"""Standard deviation, as a share of the largest value, that float32 may have made of equal rows: some 80 roundings, as
sums of thousands of products have, or of a few that nearly cancel. They depend on a row's place in the batch."""

_EXPONENT = 1 / 8
"""Of the calibrator in `EProcess`: small, so that one epoch's smallest p-value suffices."""


def leading_components(rows: Tensor, most: int = _MAX_COMPONENTS, eps: float = 0.0) -> Tensor:
    """Leading principal components of rows ``(n, C)``, after each channel was given variance one.

    Channels that differ by no more than rounding are left out.

    Args:
        rows: Any number of rows.
        most: How many components to take; fewer of few channels or rows, none of rows that are all equal.
        eps: Machine precision of what the rows were computed in; counts if it is coarser than float32, whose sums the
            16-bit types are rounded from.

    Returns:
        ``(n, d)`` in float64, uncorrelated, each of mean 0 and sum of squares 1.
    """
    x = rows.double()
    rounding = max(_NO_SPREAD, eps) * x.abs().amax(0) if len(x) else 0
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    differing = scale > rounding
    x = x[:, differing] / scale[differing]
    n, channels = x.shape
    wide = channels > n
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    largest = values[-1:].clamp(min=0).repeat(len(values))
    kept = (values > 1e-10 * largest).nonzero()[:, 0].flip(0)[: min(most, max((n - 1) // 2, 1))]
    components: Tensor = vectors[:, kept] if wide else x @ vectors[:, kept] / values[kept].sqrt()
    return components


def icc(components: Tensor, groups: Tensor) -> float:
    """Intra-class correlation of rows, over all components; the formula is at the top of this file.

    Args:
        components: ``(n, d)``, each of mean 0.
        groups: The number of each row's group, ``(n,)``.

    Example:
        >>> groups = torch.tensor([0, 0, 1, 1])
        >>> icc(torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]), groups), icc(torch.tensor([[-1.0], [1.0]] * 2), groups)
        (1.0, -1.0)
    """
    between, within = _mean_squares(components, groups)
    return (between - within) / (between + (_typical_size(group_sizes(groups)) - 1) * within)


def icc_noise(components: Tensor, groups: Tensor) -> float:
    """Standard deviation of `icc` where groups were put together at random, for rows of about normal distribution."""
    sizes = group_sizes(groups)
    k, n, d = len(sizes), int(sizes.sum()), components.shape[1]
    return float((2 / d * (1 / (k - 1) + 1 / (n - k))) ** 0.5 / _typical_size(sizes))


def comparable(components: Tensor, groups: Tensor) -> bool:
    """Whether there is anything to compare: rows that differ, two groups, and a group of two rows."""
    return components.shape[1] > 0 and 1 < len(group_sizes(groups)) < len(groups)


def group_sizes(groups: Tensor) -> Tensor:
    """Rows of each group, ``(k,)``."""
    sizes: Tensor = groups.unique(return_counts=True)[1]
    return sizes


def permutation_test(layers: Sequence[Tensor], groups: Tensor, permutations: int = 19_999, seed: int = 0) -> float:
    r"""Probability of groups at least as unlike chance as these, of the most extreme layer, under random regrouping.

    The statistic is $\max_l \sqrt{d_l} \, |\log(MS_B / MS_W)_l|$, two-sided: groups whose rows are alike make it large,
    and so do class-balanced ones. Rows keep their places in all layers, so that layers may depend on each other in any
    way. Regroupings have the same sizes. After 10 that are at least as extreme no more are drawn (Besag and Clifford,
    1991): p-values of no interest cost little.

    Args:
        layers: Of each layer `leading_components`, ``(n, d)``; row i is of the same sample in all.
        groups: The number of each row's group, ``(n,)``, the same for all layers.
        permutations: Most regroupings; the smallest p-value is one over this and one.
        seed: Of the regroupings.

    Returns:
        p-value, exact: under random grouping at most a fraction p of values is p or less.
    """
    rows = torch.cat(list(layers), 1)
    sizes, widths = group_sizes(groups), [layer.shape[1] for layer in layers]
    observed = _most_extreme(rows, groups.argsort().unsqueeze(0), sizes, widths)
    generator = torch.Generator().manual_seed(seed)
    drawn = extreme = 0
    at_once = 25
    while drawn < permutations:
        at_once = min(at_once, permutations - drawn, max(1, _SUMS_AT_ONCE // (len(sizes) * rows.shape[1])))
        orders = torch.stack([torch.randperm(len(rows), generator=generator) for _ in range(at_once)])
        # ties count, whatever the order of summation has made of them
        found = _most_extreme(rows, orders, sizes, widths) >= observed * (1 - 1e-9)
        so_far = extreme + found.cumsum(0)
        if so_far[-1] >= _ENOUGH:
            return _ENOUGH / (drawn + 1 + int((so_far >= _ENOUGH).nonzero()[0]))
        drawn, extreme = drawn + at_once, int(so_far[-1])
        at_once *= 2
    return (1 + extreme) / (1 + drawn)


def _most_extreme(rows: Tensor, orders: Tensor, sizes: Tensor, widths: list[int]) -> Tensor:
    """The statistic of P orders of rows, ``(P, n)``, of which the first rows are group 0, the next group 1, and so on.

    Rows are those of all layers side by side; each column's mean is 0 and its sum of squares 1.
    """
    k, n = len(sizes), len(rows)
    found = []
    for between, width in zip(_between(rows, orders, sizes).split(widths, 1), widths, strict=True):
        # groups of equal rows, or of equal means, are as extreme as each other, whatever rounding has left of them
        b = between.sum(1).clamp(_ROUNDING * width, (1 - _ROUNDING) * width)
        found.append(width**0.5 * ((b / (k - 1)).log() - ((width - b) / (n - k)).log()).abs())
    return torch.stack(found).amax(0)


def _between(rows: Tensor, orders: Tensor, sizes: Tensor) -> Tensor:
    """Sums of squares between the groups of each order, ``(P, d)``."""
    starts = sizes.cumsum(0) - sizes + len(rows) * torch.arange(len(orders)).unsqueeze(1)
    sums = F.embedding_bag(orders.flatten(), rows, starts.flatten(), mode="sum")  # gathers nothing: 10 times as fast
    return (sums.view(len(orders), len(sizes), -1).square() / sizes.view(-1, 1)).sum(1)


def _mean_squares(components: Tensor, groups: Tensor) -> tuple[float, float]:
    sizes = group_sizes(groups)
    x = components.double()
    between = _between(x, groups.argsort().unsqueeze(0), sizes).sum()
    within = (x.square().sum() - between).clamp(min=0)
    return float(between) / (len(sizes) - 1), float(within) / (len(groups) - len(sizes))


def _typical_size(sizes: Tensor) -> float:
    n = float(sizes.sum())
    return (n - float(sizes.square().sum()) / n) / (len(sizes) - 1)


@dataclass
class EProcess:
    r"""What the p-values of a run's epochs say together, at any time and for any number of epochs to come.

    Each p-value is turned into a bet $f(p) = p^{-7/8} / 8$ against chance, of which the mean is 1 at most where
    there is no leakage. Of a capital of 1 a share of $1 / (s (s + 1))$ waits until epoch $s$ and is then staked again
    and again, so that what begins late, or is weak but lasting, is found as well:

    $$E_t = \frac{1}{t + 1} + \sum_{s \le t} \frac{1}{s (s + 1)} \prod_{u = s}^{t} f(p_u).$$

    Without leakage the capital ever reaches $1 / \alpha$ in at most a fraction $\alpha$ of runs (Ville's inequality),
    however many epochs they have; so the run's p-value is one over the largest capital so far.

    Attributes:
        epochs: p-values so far.
        staked: The sum in the formula.
        largest: Largest capital so far.

    Example:
        >>> evidence = EProcess()
        >>> for p in (0.02, 0.6, 0.01, 0.004, 0.01):
        ...     evidence.add(p)
        >>> round(evidence.p_value, 4)
        0.0026
    """

    epochs: int = 0
    staked: float = 0.0
    largest: float = 1.0

    def add(self, p_value: float) -> None:
        """Take in the p-value of one more epoch."""
        self.epochs += 1
        share = 1 / (self.epochs * (self.epochs + 1))
        self.staked = (self.staked + share) * _EXPONENT * p_value ** (_EXPONENT - 1)
        self.largest = max(self.largest, self.staked + 1 / (self.epochs + 1))

    @property
    def p_value(self) -> float:
        """Of the run so far; never rises."""
        return 1 / self.largest
