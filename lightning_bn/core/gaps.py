"""Gap: how far one set of statistics lies from another, in one number for a layer's means and one for its variances.

Each is the root mean square over channels of an *offset*, which keeps its sign and its channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_VARIANCE = 1e-12
"""Stands in for the variance of a dead channel, whose gap in units of its own sigma would be infinite."""


def mean_offsets(mean: Tensor, from_mean: Tensor, from_var: Tensor) -> Tensor:
    """How many sigma each channel's mean has moved: ``(mean - from_mean) / sqrt(from_var)``, ``(C,)``."""
    return (mean - from_mean) / from_var.clamp(min=_SMALLEST_VARIANCE).sqrt()


def var_offsets(var: Tensor, from_var: Tensor) -> Tensor:
    """Log ratio of each channel's variances: ``log(var / from_var)``, ``(C,)``."""
    return torch.log(var.clamp(min=_SMALLEST_VARIANCE) / from_var.clamp(min=_SMALLEST_VARIANCE))


def mean_gap(mean: Tensor, from_mean: Tensor, from_var: Tensor) -> Tensor:
    """Root mean square over channels of ``(mean - from_mean) / sqrt(from_var)``: how many sigma the means have moved.

    Args:
        mean: New means, ``(C,)``.
        from_mean: Means they are held against, ``(C,)``.
        from_var: Variances that give the unit, ``(C,)``.

    Returns:
        A scalar, 0 for equal statistics.

    Example:
        >>> import torch
        >>> mean_gap(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(0.7071, dtype=torch.float64)
    """
    return mean_offsets(mean.double(), from_mean.double(), from_var.double()).square().mean().sqrt()


def var_gap(var: Tensor, from_var: Tensor) -> Tensor:
    """Root mean square over channels of ``log(var / from_var)``: 0.7 is a factor of two, up or down.

    Args:
        var: New variances, ``(C,)``.
        from_var: Variances they are held against, ``(C,)``.

    Returns:
        A scalar, 0 for equal statistics.

    Example:
        >>> import torch
        >>> var_gap(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor(0.4901, dtype=torch.float64)
    """
    return var_offsets(var.double(), from_var.double()).square().mean().sqrt()
