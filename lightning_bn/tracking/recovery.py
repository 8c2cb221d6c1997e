"""The statistics of a training batch, from the running statistics before and after it.

A layer that is called k times moves its running statistics from r0 to ``r1 = decay * r0 + (1 - decay) * batch``, with
``decay = (1 - momentum)^k``. So ``batch = (r1 - decay * r0) / (1 - decay)``, without a hook.

torch's own classes move by this rule. A subclass may have another one, such as biased variances: `differs_from_torch`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.tracking.drift import is_dead
from lightning_bn.tracking.layer_calls import Call

MAX_ERROR = 1e-2
"""Largest error of a recovered mean, in sigma. Layers with a larger one are measured directly."""

_MAX_MEAN_DIFFERENCE, _MAX_VAR_DIFFERENCE = 1e-3, 1e-4
"""Allowed differences between recovered and measured batch, in sigma and log ratio, in addition to rounding."""


class RecoveredSteps(NamedTuple):
    """Holds the statistics of ``N`` steps: means and variances, ``(N, 2, C)`` each."""

    before: Tensor
    after: Tensor
    batch: Tensor  # an average, if there were several calls
    decay: Tensor  # weight of before in after, (N, C)
    called: Tensor  # channels whose layer was called and whose batch is known, (N, C)


def ema_decay(momentum: Tensor, calls: Tensor, tracked: Tensor) -> Tensor:
    """Return ``(1 - momentum)^calls``; a momentum of NaN is the average of all batches, ``tracked`` ones before."""
    averaged = tracked.to(momentum) / (tracked + calls).clamp(min=1)
    return averaged.where(momentum.isnan(), (1 - momentum) ** calls)


def solve_batch_stats(before: Tensor, after: Tensor, decay: Tensor) -> Tensor:
    """Return the batch statistics, with unbiased variances, of a move from ``before`` to ``after``."""
    return (after - decay * before) / (1 - decay)


def recovery_error(mean: Tensor, var: Tensor, decay: Tensor) -> Tensor:
    """Return a recovered mean's error by float32 rounding, in sigma: ``2^-23 |mean| / ((1 - decay) sigma)``."""
    return 2**-23 * mean.abs() / ((1 - decay) * var.sqrt())


def differs_from_torch(calls: list[Call], tracked: Tensor, step: RecoveredSteps, eps: float) -> Tensor:
    """Return whether a layer's recovered step differs from its measured calls, averaged as torch's EMA would.

    The result is a tensor ``()``; reading it waits for the device.
    """
    running, batch = step.before[0], step.batch[0]
    expected, decay = running, torch.ones((), dtype=running.dtype, device=running.device)
    for number, call in enumerate(calls, 1):
        share = 1 / (tracked + number).to(decay) if call.momentum is None else torch.full_like(decay, call.momentum)
        expected, decay = expected.lerp(call.statistics().to(running), share), decay * (1 - share)
    mean, var = solve_batch_stats(running, expected, decay)

    mean_difference = (batch[0] - mean).abs() / var.sqrt() - 2 * recovery_error(running[0], var, decay)
    var_difference = (batch[1] / var).log().abs() - 2**-20 * running[1] / (var * (1 - decay))
    differs = mean_difference.nan_to_num(torch.inf) > _MAX_MEAN_DIFFERENCE
    differs |= var_difference.nan_to_num(torch.inf) > _MAX_VAR_DIFFERENCE
    comparable = mean.isfinite() & var.isfinite() & running.isfinite().all(0) & ~is_dead(var, eps)
    return torch.any(differs & comparable & step.called[0])
