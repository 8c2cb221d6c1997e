"""Gap between two sets of statistics of a layer: one number for its means and one for its variances.

Each gap is the root mean square over channels of an offset, which keeps its sign and its channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST_VARIANCE = 1e-12  # keeps the offsets of dead channels finite


def mean_offsets(mean: Tensor, from_mean: Tensor, from_var: Tensor) -> Tensor:
    """Return the distance of each channel's means in sigma: ``(mean - from_mean) / sqrt(from_var)``, ``(C,)``."""
    return (mean - from_mean) / from_var.clamp(min=_SMALLEST_VARIANCE).sqrt()


def var_offsets(var: Tensor, from_var: Tensor) -> Tensor:
    """Return the log ratio of each channel's variances: ``log(var / from_var)``, ``(C,)``."""
    return torch.log(var.clamp(min=_SMALLEST_VARIANCE) / from_var.clamp(min=_SMALLEST_VARIANCE))


def mean_gap(mean: Tensor, from_mean: Tensor, from_var: Tensor) -> Tensor:
    """Return the root mean square over channels of ``(mean - from_mean) / sqrt(from_var)``, a scalar in float64."""
    return mean_offsets(mean.double(), from_mean.double(), from_var.double()).square().mean().sqrt()


def var_gap(var: Tensor, from_var: Tensor) -> Tensor:
    """Return the root mean square over channels of ``log(var / from_var)``, a float64 scalar: 0.69 for a factor of 2.

    Example:
        >>> import torch
        >>> var_gap(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor(0.4901, dtype=torch.float64)
    """
    return var_offsets(var.double(), from_var.double()).square().mean().sqrt()


def gaps_of_layers(
    statistics: Sequence[tuple[Tensor, Tensor]], from_statistics: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[float, float]]:
    """Return mean gap and variance gap of each layer, from its mean and variance in both arguments.

    Waits for the device once, for all layers.
    """
    gaps = [
        torch.stack([mean_gap(mean, from_mean, from_var), var_gap(var, from_var)])
        for (mean, var), (from_mean, from_var) in zip(statistics, from_statistics, strict=True)
    ]
    return [(of_mean, of_var) for of_mean, of_var in torch.stack(gaps).tolist()] if gaps else []
