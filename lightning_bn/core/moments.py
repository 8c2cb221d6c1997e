"""Moments: how many values a channel has seen, their mean, and their spread; and how to add two of them up.

Merging counts, means and sums of squared deviations (Chan et al., 1983) in float64 is exact where the textbook
``E[x^2] - E[x]^2`` cancels: at mean 1e4 and standard deviation 1 the latter has produced variances of -8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_ONCE = 2048
"""Rows the CPU kernel may add up in float32 before we go on in float64: its rounding error grows with the number."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and M2 (the sum of squared deviations from the mean) of each channel.

    Shapes: ``mean`` and ``m2`` are ``(C,)`` in float64, ``count`` is ``()`` or ``(C,)`` in float64.

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
        """Moments of nothing: the neutral element of ``+``."""
        count, mean, m2 = torch.zeros(3, channels, dtype=torch.float64, device=device)
        return cls(count, mean, m2)

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments of the values of ``x`` of shape ``(N, C, ...)``, per channel."""
        mean, var = batch_statistics(x)
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device)
        return cls(count, mean.double(), var.double() * count)

    @property
    def var(self) -> Tensor:
        """Population variance, ``M2 / count``: biased, as in the paper's Eq. 2; 0 where nothing was seen."""
        return self.m2 / self.count.clamp(min=1)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of values together."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)  # of nothing and nothing: 0, not NaN
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)


def may_use_kernel(x: Tensor) -> bool:
    """Whether torch's batch-norm kernel may take the statistics of ``x`` to the accuracy of `batch_statistics`.

    On CUDA it does. On the CPU it adds up in float64 where the values of a channel lie side by side, but in float32
    row after row where the channels of a row do (channels_last, ``(N, C)``): up to 12 sigma off at mean 1e4 and 4e5
    rows.
    """
    if x.device.type != "cpu":
        return x.device.type == "cuda"
    return x.element_size() > 2 and (_channels_apart(x) or x.numel() <= _ROWS_AT_ONCE * x.shape[1])


def kernel_was_accurate(x: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Whether it took ``mean`` and ``var`` of an ``x`` that it may be used on: not if it added up large means."""
    return x.device.type == "cuda" or _channels_apart(x) or not _is_large(mean, var, x.numel() // len(mean))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``x``, by the statistics half of torch's batch-norm kernel.

    Accuracy: mean within ``1e-6 sigma + 2^-22 |mean|`` (``4e-6 sigma`` on the CPU where a row's channels lie side by
    side: a stricter limit would cost most such inputs a second reading), variance within 1e-5 relative and
    ``(2^-22 mean)^2``, which is what rounding the mean to float32 does to it. Where the kernel alone misses that, it
    gets a few rows at a time, and with the mean taken off where that is large.

    Args:
        x: Floating-point tensor of shape ``(N, C, ...)`` with at least one value per channel.

    Returns:
        Mean and variance, each ``(C,)``, in float32 or float64.
    """
    if x.device.type == "cuda":
        return _kernel(x)
    if x.device.type != "cpu":  # no such kernel there: pay for a second read
        var, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
        return mean, var
    if _channels_apart(x):
        return _pooled(x.split(1) if x.element_size() == 2 else (x,))  # 16-bit: widened sample by sample
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    pieces = rows.split(_ROWS_AT_ONCE) if len(rows) > _ROWS_AT_ONCE else (rows,)
    mean, var = _pooled(pieces)
    if _is_large(mean, var, len(rows)):
        origin = mean.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = _pooled(pieces, origin)
        mean = mean + origin
    return mean, var


def _channels_apart(x: Tensor) -> bool:
    """Whether the values of a channel lie side by side in a sample of ``x``, as in NCHW."""
    return x.ndim > 2 and x.is_contiguous()


def _is_large(mean: Tensor, var: Tensor, rows: int) -> bool:
    """Whether some channel's mean is so large that adding up in float32 loses digits of sigma that are promised.

    The rounding error grows with the rows added up: as measured, 1000/rows sigma are harmless, and any mean up to 16
    rows. Over several pieces it averages out.
    """
    harmless = 2.0 if rows > _ROWS_AT_ONCE else 1000 / rows
    return rows > 16 and bool((mean.square() - harmless**2 * var).amax() > 0)


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.batch_norm_update_stats(x.float() if x.element_size() == 2 else x, None, None, 0.0)


def _pooled(pieces: Sequence[Tensor], origin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Statistics of values that come in pieces, relative to ``origin``."""
    first, scratch, found = pieces[0], None, []
    if origin is not None or first.element_size() == 2:  # one buffer for all pieces: many would fragment the heap
        scratch = torch.empty(first.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    for piece in pieces:
        if scratch is not None:
            piece = scratch[: len(piece)].copy_(piece)
        found.append(_kernel(piece if origin is None else piece.sub_(origin)))
    if len(found) == 1:
        return found[0]
    means, variances = (torch.stack(s).double() for s in zip(*found, strict=True))
    share = torch.tensor([[p.numel()] for p in pieces], dtype=torch.float64)
    share /= share.sum()
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)
