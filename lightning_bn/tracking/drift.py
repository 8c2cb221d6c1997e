"""Gap, lag and noise: the distance of batch statistics from the EMA over a window of steps.

The offset of a channel is ``(batch mean - EMA mean) / EMA sigma``, or ``log(batch variance / EMA variance)``. Each
value is a root mean square over the channels of a layer, and ``gap^2 = lag^2 + noise^2``:

- gap: of all offsets;
- lag: of each channel's mean offset. The EMA is out of date (the paper's Issue 1);
- noise: of each channel's standard deviation. The normalization batch is small (Issue 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.core.moments import Moments

# values for all layers together, and for each layer
AGGREGATES = (
    *("mean_gap_p50", "mean_gap_p95", "mean_gap_max", "worst_layer", "var_gap_p95", "var_gap_max"),
    *("lag_max", "noise_max", "dead_channels", "nonfinite_layers"),
)
QUANTITIES = ("mean_gap", "var_gap", "lag", "noise", "var_lag", "var_noise", "dead", "nonfinite")


class Drift(NamedTuple):
    """Holds gap, lag and noise of each layer, ``(..., L)``; NaN for a layer without a measured channel."""

    gap: Tensor
    lag: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Observation:
    """Holds the result of a window for each layer, in tensors ``(L,)``, float64."""

    means: Drift  # in sigma of the EMA
    variances: Drift  # of the log variances
    dead: Tensor  # fraction of channels whose variance is near zero; they count in no gap
    nonfinite: Tensor  # fraction of channels with a NaN or infinite statistic; they count in no gap
    channels: Tensor  # number of channels
    direct: Mapping[str, str]  # layer name -> why its batches were measured directly, or not at all

    def per_layer(self) -> dict[str, Tensor]:
        """Return `QUANTITIES` by name."""
        means, variances = self.means, self.variances
        values = (means.gap, variances.gap, means.lag, means.noise, variances.lag, variances.noise)
        return dict(zip(QUANTITIES, (*values, self.dead, self.nonfinite), strict=True))

    def aggregates(self) -> dict[str, float]:
        """Return `AGGREGATES` by name; NaN if no layer was measured."""
        gaps, var_gaps = self.means.gap, self.variances.gap
        values = (
            *(gaps.nanquantile(q) for q in (0.5, 0.95, 1.0)),
            torch.nan if gaps.isnan().all() else gaps.nan_to_num(-1.0).argmax(),
            *(var_gaps.nanquantile(q) for q in (0.95, 1.0)),
            *(part.nanquantile(1.0) for part in (self.means.lag, self.means.noise)),
            (self.dead * self.channels).sum().round(),
            (self.nonfinite > 0).sum(),
        )
        return {name: float(value) for name, value in zip(AGGREGATES, values, strict=True)}


def split(window: Moments, sizes: Sequence[int]) -> Drift:
    """Split the offsets of a window, ``(..., C)``, into lag and noise of each layer.

    The lag of a perfect EMA is above 0, because the EMA and the window mean are noisy.
    """
    measured = window.count > 0
    numbers = torch.stack([part.sum(-1) for part in measured.split(list(sizes), -1)], -1)

    def rms(squares: Tensor) -> Tensor:
        of_layers = torch.where(measured, squares, 0.0).split(list(sizes), -1)
        return (torch.stack([part.sum(-1) for part in of_layers], -1) / numbers).sqrt()

    lag, noise = rms(window.mean.square()), rms(window.var)
    return Drift((lag.square() + noise.square()).sqrt(), lag, noise)


def is_dead(var: Tensor, eps: float | Tensor) -> Tensor:
    """Mark channels with a variance below ``eps / 100``: their normalized values vary by at most a tenth."""
    return var < 0.01 * eps
