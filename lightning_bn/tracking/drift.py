"""Drift: how far batch statistics lie from the EMA over a window of steps, split into *lag* and *noise*.

For each channel the offsets of a window have a mean and a spread. The mean is lag: the EMA is stale, as with large
learning rates (the paper's Issue 1). The spread is noise: the normalization batch is small (Issue 2). Both together
are the gap: ``gap^2 = lag^2 + noise^2``.

A window is a `Moments` value over offsets, so it can be added up over steps and merged over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.core.moments import Moments


class Drift(NamedTuple):
    """Root mean squares over the channels of each layer, ``(..., L)``; NaN for a layer without a measured channel.

    Attributes:
        gap: Of all offsets in the window.
        lag: Of the channels' mean offsets.
        noise: Of the channels' standard deviations of offsets.
    """

    gap: Tensor
    lag: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Observation:
    """What a window of batches says of each layer, in their order; every tensor is ``(L,)`` float64.

    Attributes:
        means: Drift of the means, in sigma of the EMA.
        variances: Drift of the log variances.
        dead: Fraction of channels whose variance is near zero; they count in no gap.
        nonfinite: Fraction of channels in which a NaN or infinite statistic was seen; they count in no gap.
        channels: Number of channels.
        direct: Layer name -> why its batches were measured directly, or not at all.
    """

    means: Drift
    variances: Drift
    dead: Tensor
    nonfinite: Tensor
    channels: Tensor
    direct: Mapping[str, str]

    def per_layer(self) -> dict[str, Tensor]:
        """Every quantity by its name in logs."""
        found = {"mean_gap": self.means.gap, "var_gap": self.variances.gap}
        found |= {"lag": self.means.lag, "noise": self.means.noise}
        found |= {"var_lag": self.variances.lag, "var_noise": self.variances.noise}
        return found | {"dead": self.dead, "nonfinite": self.nonfinite}

    def aggregates(self) -> dict[str, float]:
        """Ten figures for all layers together: where to look first. NaN where no layer was measured."""
        gaps, var_gaps = self.means.gap, self.variances.gap
        measured = not bool(gaps.isnan().all())
        return {
            "mean_gap_p50": float(gaps.nanquantile(0.5)),
            "mean_gap_p95": float(gaps.nanquantile(0.95)),
            "mean_gap_max": float(gaps.nanquantile(1.0)),
            "worst_layer": float(gaps.nan_to_num(-1.0).argmax()) if measured else torch.nan,
            "var_gap_p95": float(var_gaps.nanquantile(0.95)),
            "var_gap_max": float(var_gaps.nanquantile(1.0)),
            "lag_max": float(self.means.lag.nanquantile(1.0)),
            "noise_max": float(self.means.noise.nanquantile(1.0)),
            "dead_channels": float((self.dead * self.channels).sum().round()),
            "nonfinite_layers": float((self.nonfinite > 0).sum()),
        }


AGGREGATES = (
    *("mean_gap_p50", "mean_gap_p95", "mean_gap_max", "worst_layer", "var_gap_p95", "var_gap_max"),
    *("lag_max", "noise_max", "dead_channels", "nonfinite_layers"),
)
"""Figures for all layers together."""

QUANTITIES = ("mean_gap", "var_gap", "lag", "noise", "var_lag", "var_noise", "dead", "nonfinite")
"""What there is of each layer."""


def split(window: Moments, sizes: Sequence[int]) -> Drift:
    """Split the offsets of a window into lag and noise, layer by layer.

    With an EMA that follows perfectly, lag is not quite 0: the EMA carries noise of its own, and so does a mean of few
    batches. At momentum 0.1 they read as a lag of 0.06 of the noise over 50 consecutive batches, of 0.26 over 10, and
    of 0.32 over every fifth of 50. Over a single batch everything is lag.

    Args:
        window: Moments of offsets, ``(..., C)``, channels of all layers side by side; the count is that of steps.
        sizes: Number of channels of each layer; they add up to ``C``.

    Example:
        >>> import torch
        >>> offsets = torch.tensor([[0.5, 1.5], [0.5, -0.5]], dtype=torch.float64)  # two steps, two channels
        >>> window = sum((Moments(torch.ones(2), o, torch.zeros(2)) for o in offsets), Moments.empty(2))
        >>> split(window, [1, 1]).lag, split(window, [1, 1]).noise
        (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([0., 1.], dtype=torch.float64))
    """
    lag, noise = (_rms_of_layers(squares, window.count > 0, sizes) for squares in (window.mean.square(), window.var))
    return Drift((lag.square() + noise.square()).sqrt(), lag, noise)


def is_dead(var: Tensor, eps: float | Tensor) -> Tensor:
    """Which channels have a variance near zero, below ``eps / 100``: what the layer puts out varies by a tenth at most.

    Args:
        var: Variance of each channel, ``(C,)``.
        eps: The layer's, or that of each channel, ``(C,)``.
    """
    return var < 0.01 * eps


def share_of_layers(where: Tensor, sizes: Sequence[int]) -> Tensor:
    """Fraction of each layer's channels for which ``where``, ``(C,)``, is true."""
    return torch.stack([part.double().mean() for part in where.split(list(sizes))])


def _rms_of_layers(squares: Tensor, measured: Tensor, sizes: Sequence[int]) -> Tensor:
    counted = torch.where(measured, squares, 0.0).split(list(sizes), -1)
    numbers = measured.expand_as(squares).split(list(sizes), -1)
    return torch.stack([(c.sum(-1) / n.sum(-1)).sqrt() for c, n in zip(counted, numbers, strict=True)], -1)
