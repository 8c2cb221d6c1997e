"""Recover the statistics of a training batch from the running statistics before and after it.

A layer that is called k times moves its running statistics from r0 to ``r1 = decay * r0 + (1 - decay) * batch``, with
``decay = (1 - momentum)^k``. Solved for the batch, ``batch = (r1 - decay * r0) / (1 - decay)``: no hook, and no read of
an activation.
"""

from __future__ import annotations

from torch import Tensor

MAX_ERROR = 1e-2
"""Largest error of a recovered mean, in sigma. Layers with a larger one are measured directly."""


def ema_decay(momentum: Tensor, calls: Tensor, tracked: Tensor) -> Tensor:
    """Weight of the old running statistics after some calls: ``(1 - momentum)^calls``.

    Args:
        momentum: Momentum of each layer, ``(L,)``; NaN for None, the average of all batches.
        calls: Calls of each layer, ``(L,)``.
        tracked: ``num_batches_tracked`` of each layer before these calls, ``(L,)``.

    Example:
        >>> import torch
        >>> nan = float("nan")
        >>> ema_decay(torch.tensor([0.1, 0.1, nan]), torch.tensor([1, 2, 1]), torch.tensor([0, 0, 3]))
        tensor([0.9000, 0.8100, 0.7500])
    """
    averaged = tracked.to(momentum) / (tracked + calls).clamp(min=1)
    return averaged.where(momentum.isnan(), (1 - momentum) ** calls)


def solve_batch_stats(before: Tensor, after: Tensor, decay: Tensor) -> Tensor:
    """Batch statistics that moved running statistics from ``before`` to ``after``; of several calls, their average.

    Variances are unbiased, as running variances are. NaN for a layer that was not called.

    Example:
        >>> import torch
        >>> solve_batch_stats(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.5]))
        tensor([3.])
    """
    return (after - decay * before) / (1 - decay)


def recovery_error(mean: Tensor, var: Tensor, decay: Tensor) -> Tensor:
    """Error of a recovered mean by float32 rounding, in sigma: ``2^-23 |mean| / ((1 - decay) sigma)``."""
    return 2**-23 * mean.abs() / ((1 - decay) * var.sqrt())
