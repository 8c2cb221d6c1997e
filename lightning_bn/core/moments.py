"""Moments: count, mean and sum of squared deviations of each channel, and how to merge them.

Merging in float64 (Chan et al., 1983) is exact where the textbook ``E[x^2] - E[x]^2`` cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ROWS = 2048  # rows that the CPU kernel sums in float32 at a time: its rounding error grows with their number
MAX_KERNEL_ROWS = 2**15
"""Up to this many rows, float32 sums over rows keep any variance to 1e-3 of itself."""
MAX_KERNEL_SHIFT = 6000.0**2
"""Limit of ``(rows * mean)^2 / var``, up to which float32 sums over rows keep a mean to 1e-4 sigma."""


@dataclass(frozen=True)
class Moments:
    r"""Stores count, mean and M2 (sum of squared deviations from the mean) of each channel; ``+`` merges exactly.

    $M_2 = M_{2a} + M_{2b} + (\mu_b - \mu_a)^2 n_a n_b / (n_a + n_b)$

    Attributes:
        count: Values per channel, ``()`` or ``(C,)`` in float64.
        mean: Means, ``(C,)`` in float64.
        m2: Sums of squared deviations, ``(C,)`` in float64.

    Example:
        >>> import torch
        >>> from lightning_bn import Moments
        >>> a, b = Moments.of(torch.tensor([[1.0], [2.0]])), Moments.of(torch.tensor([[6.0]]))
        >>> (a + b).mean, (a + b).var
        (tensor([3.], dtype=torch.float64), tensor([4.6667], dtype=torch.float64))
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no values: the neutral element of ``+``."""
        count, mean, m2 = torch.zeros(3, channels, dtype=torch.float64, device=device)
        return cls(count, mean, m2)

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Measure each channel of ``x`` of shape ``(N, C, ...)``."""
        mean, var = batch_statistics(x)
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device)
        return cls(count, mean.double(), var.double() * count)

    @classmethod
    def merge(cls, parts: Sequence[Moments]) -> Moments:
        """Merge the moments of all parts, in a fixed number of operators; counts may stay on the CPU."""
        counts, means, m2s = (
            torch.stack(column) for column in zip(*((p.count, p.mean, p.m2) for p in parts), strict=True)
        )
        return merge_rows(counts, means, m2s)

    @property
    def var(self) -> Tensor:
        """Return the biased population variance, ``M2 / count``; 0 without values."""
        return self.m2 / self.count.clamp(min=1)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = other.count / count.clamp(min=1)  # of no values at all: 0, not NaN
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)


def merge_rows(counts: Tensor, means: Tensor, m2s: Tensor) -> Moments:
    """Merge moments that are the rows of three tensors; changes ``m2s``."""
    count = counts.sum(0)
    weights = counts.reshape(len(means), -1).to(means.device)
    mean = (weights * means).sum(0) / count.clamp(min=1)
    return Moments(count, mean, m2s.addcmul_(weights, (means - mean).square_()).sum(0))


def may_use_kernel(x: Tensor) -> bool:
    """Return True if torch's batch-norm kernel can measure ``x`` accurately, large means excepted.

    On the CPU it sums contiguous channels in float64, but channels_last and ``(N, C)`` inputs row by row in float32.
    """
    if x.device.type != "cpu":
        return x.device.type == "cuda"
    return x.element_size() > 2 and (_is_channel_contiguous(x) or x.numel() <= MAX_KERNEL_ROWS * x.shape[1])


def kernel_was_accurate(x: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Return True if the kernel's ``mean`` of an ``x`` that it may measure is within 1e-4 sigma."""
    if x.device.type == "cuda" or _is_channel_contiguous(x):
        return True
    return not (mean.square() * (x.numel() // len(mean)) ** 2 > MAX_KERNEL_SHIFT * var).any()


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel of ``x`` ``(N, C, ...)``, ``(C,)`` each, in float32 or float64.

    Accuracy: mean within ``1e-6 sigma + 2^-22 |mean|`` (``4e-6 sigma`` on the CPU if channels are contiguous), variance
    within 1e-5 relative and ``(2^-22 mean)^2``. Where torch's kernel alone is less accurate, it gets a few rows at a
    time, and a large mean is subtracted first.
    """
    if x.device.type == "cuda":
        return _kernel(x)
    if x.device.type != "cpu":  # no such kernel there
        var, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
        return mean, var
    if _is_channel_contiguous(x):
        return _chunked(x.split(1) if x.element_size() == 2 else (x,))  # 16-bit: widened sample by sample
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    if len(rows) <= 16:
        return _chunked((rows,))
    chunks = rows.split(_CHUNK_ROWS) if len(rows) > _CHUNK_ROWS else (rows,)
    # measured: means up to 1000/rows sigma are harmless; several chunks average the error out
    harmless = 2.0 if len(chunks) > 1 else 1000 / len(rows)
    origin, wide = None, torch.promote_types(x.dtype, torch.float32)
    if len(chunks) > 1:  # the mean of the first chunk is near enough that others are read once
        mean, var = _chunked(chunks[:1])
        origin = mean.to(wide) if _is_far(mean, var, harmless) else None
    mean, var = _chunked(chunks, origin)
    if _is_far(mean, var, harmless):
        origin = mean.to(wide) + (0.0 if origin is None else origin)
        mean, var = _chunked(chunks, origin)
    return (mean if origin is None else mean + origin), var


def _is_far(mean: Tensor, var: Tensor, sigmas: float) -> bool:
    return bool((mean.square() - sigmas**2 * var).amax() > 0)


def _is_channel_contiguous(x: Tensor) -> bool:
    return x.ndim > 2 and x.is_contiguous()


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.batch_norm_update_stats(x.float() if x.element_size() == 2 else x, None, None, 0.0)


def _chunked(chunks: Sequence[Tensor], origin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    first, scratch, statistics = chunks[0], None, []
    if origin is not None or first.element_size() == 2:  # one buffer for all: many would fragment the heap
        scratch = torch.empty(first.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    for chunk in chunks:
        if scratch is not None:
            chunk = scratch[: len(chunk)].copy_(chunk)
        statistics.append(_kernel(chunk if origin is None else chunk.sub_(origin)))
    if len(statistics) == 1:
        return statistics[0]
    means, variances = (torch.stack(s).double() for s in zip(*statistics, strict=True))
    share = torch.tensor([[chunk.numel()] for chunk in chunks], dtype=torch.float64)
    share /= share.sum()
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)
