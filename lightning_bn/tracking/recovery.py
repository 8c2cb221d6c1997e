"""EMA recovery: the statistics of a training batch, from the running statistics before and after it.

A layer called ``k`` times moves its running statistics from ``r0`` to ``r1 = kept * r0 + (1 - kept) * batch``, where
``kept = (1 - momentum)^k``. So ``batch`` can be solved for, without a hook and without reading an activation.
"""

from __future__ import annotations

from torch import Tensor

MAX_ERROR = 1e-2
"""Sigma by which a recovered mean may be off; where it may be more, the layer is measured directly."""


def ema_decay(momentum: Tensor, calls: Tensor, tracked: Tensor) -> Tensor:
    """What is left of the running statistics after some calls.

    Args:
        momentum: Each layer's momentum, ``(L,)``; NaN for None, a cumulative average.
        calls: Calls of each layer, ``(L,)``.
        tracked: ``num_batches_tracked`` of each layer before them, ``(L,)``.

    Example:
        >>> import torch
        >>> nan = float("nan")
        >>> ema_decay(torch.tensor([0.1, 0.1, nan]), torch.tensor([1, 2, 1]), torch.tensor([0, 0, 3]))
        tensor([0.9000, 0.8100, 0.7500])
    """
    averaged = tracked.to(momentum) / (tracked + calls).clamp(min=1)
    return averaged.where(momentum.isnan(), (1 - momentum) ** calls)


def recovered(before: Tensor, after: Tensor, kept: Tensor) -> Tensor:
    """Batch statistics that moved running statistics from ``before`` to ``after``; of several calls, their average.

    ``(after - kept * before) / (1 - kept)``. Variances come out unbiased, as running variances are. NaN where nothing
    was called.

    Example:
        >>> import torch
        >>> recovered(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.5]))
        tensor([3.])
    """
    return (after - kept * before) / (1 - kept)


def recovery_error(mean: Tensor, var: Tensor, kept: Tensor) -> Tensor:
    """Sigma by which rounding of a float32 running mean may put a recovered mean off: ``2^-23 |mean| / (m sigma)``."""
    return 2**-23 * mean.abs() / ((1 - kept) * var.sqrt())
