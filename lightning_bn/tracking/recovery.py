"""The statistics of a training batch, from the running statistics before and after it.

A layer that is called k times moves its running statistics from r0 to ``r1 = decay * r0 + (1 - decay) * batch``, with
``decay = (1 - momentum)^k``. So ``batch = (r1 - decay * r0) / (1 - decay)``, without a hook.
"""

from __future__ import annotations

from torch import Tensor

MAX_ERROR = 1e-2
"""Largest error of a recovered mean, in sigma. Layers with a larger one are measured directly."""


def ema_decay(momentum: Tensor, calls: Tensor, tracked: Tensor) -> Tensor:
    """Return the weight of the old running statistics after some calls: ``(1 - momentum)^calls``.

    A momentum of NaN stands for None, the average of all batches; ``tracked`` is ``num_batches_tracked`` before the
    calls.

    Example:
        >>> import torch
        >>> nan = float("nan")
        >>> ema_decay(torch.tensor([0.1, 0.1, nan]), torch.tensor([1, 2, 1]), torch.tensor([0, 0, 3]))
        tensor([0.9000, 0.8100, 0.7500])
    """
    averaged = tracked.to(momentum) / (tracked + calls).clamp(min=1)
    return averaged.where(momentum.isnan(), (1 - momentum) ** calls)


def solve_batch_stats(before: Tensor, after: Tensor, decay: Tensor) -> Tensor:
    """Return the batch statistics, with unbiased variances, of a move from ``before`` to ``after``."""
    return (after - decay * before) / (1 - decay)


def recovery_error(mean: Tensor, var: Tensor, decay: Tensor) -> Tensor:
    """Return a recovered mean's error by float32 rounding, in sigma: ``2^-23 |mean| / ((1 - decay) sigma)``."""
    return 2**-23 * mean.abs() / ((1 - decay) * var.sqrt())
