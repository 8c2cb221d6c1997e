"""Forecast: the statistics that the next batch will have, from those of the batches before.

A layer's batch statistics, averaged over the last 1, 2, 4, ... 32 steps, and its running statistics are *candidates*.
The forecast is the weighted sum of candidates that would have forecast the last ten or so batches best: one regression
a layer, over all of its channels, for the means and one for the log variances. Weights add up to 1 and may be negative,
so that trends and oscillations are among the sums (twice a short average less a long one goes on in a straight line),
as is the filter of any local level or local trend (Kalman, Holt).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bn.tracking.drift import is_dead

SPANS = (1, 2, 4, 8, 16, 32)
"""Steps over which batch statistics are averaged, each weighing ``1 - 1/span`` of the one after it."""

_DISCOUNT = 0.9
"""What a step's errors weigh one step later: learning rates change, and a filter that was right is so for a while."""

_RIDGE = 1.0
"""How strongly weights are drawn to the best candidate alone, as a multiple of its squared error."""

_SMALLEST_VARIANCE = 1e-12


class Forecast(NamedTuple):
    """What the next batches are expected to have.

    Attributes:
        mean: Mean of each channel, ``(C,)``.
        var: Variance of each channel over all batches, that of their means included, ``(C,)``.
        error: By how much a batch was lately off its forecast, root mean square over each layer's channels, noise of
            the batch included: means in sigma, and log variances, ``(2, L)``; NaN for a layer without a past.
    """

    mean: Tensor
    var: Tensor
    error: Tensor


class RidgeForecaster:
    r"""Forecasts the statistics of layers whose channels lie side by side in one vector.

    With $a_k$ the candidates before a step, $x$ what the step's batch had (means in units of its sigma, log
    variances), the weights of a layer are

    $$w = \arg\min_{\sum w = 1} \sum_t 0.9^{T-t} \, \overline{(\textstyle\sum_k w_k a_{k,t} - x_t)^2}
    + \lambda |w - w_0|^2,$$

    the bar being the mean over channels, $w_0$ the best candidate alone and $\lambda$ its error. The noise that a batch
    has by its size is in every candidate's error alike: where it is large, long averages win. The variance of a
    population includes that of its batches' means (paper, Eq. 2), which is taken from the error of their forecast:
    $\sigma^2 = \exp(\text{forecast}) (1 + \text{error}^2)$.

    Channels that are nearly dead, and steps in which a layer was not called, teach nothing.

    Steps are taken in one by one or many at once, with the same result to rounding; many at once cost an operation a
    step, and a small matrix product a layer for all of them. Memory: 13 numbers a channel, and 99 a layer.

    Args:
        sizes: Channels of each layer, ``L`` of them; they add up to ``C``.
        eps: The layers' eps, for each channel, ``(C,)``; says precision and device, too.

    Example:
        >>> forecaster = RidgeForecaster([1], torch.full((1,), 1e-5, dtype=torch.float64))
        >>> running = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> for step in range(40):  # the mean rises by 0.1 a step
        ...     batch = torch.tensor([[0.1 * step], [1.0]], dtype=torch.float64)
        ...     forecaster.update(batch[None], running[None], torch.tensor([[True]]))
        ...     running = 0.9 * running + 0.1 * batch
        >>> round(float(running[0]), 2), round(float(forecaster.forecast(running).mean), 2)  # 4.0 would be right
        (3.01, 4.0)
    """

    def __init__(self, sizes: Sequence[int], eps: Tensor) -> None:
        channels, candidates = len(eps), len(SPANS) + 1
        self._sizes, self._eps = list(sizes), eps
        self._layer_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(eps.device)
        self._starts = [0, *accumulate(sizes)]
        self._decay = 1 - 1 / torch.tensor(SPANS).to(eps).view(-1, 1, 1)
        self._averages = eps.new_zeros(2, len(SPANS), channels)
        self._steps = eps.new_zeros(channels)
        self._products = eps.new_zeros(2, len(sizes), candidates, candidates)
        self._weight = eps.new_zeros(len(sizes))

    def update(self, batches: Tensor, running: Tensor, counted: Tensor, layers: slice = slice(None)) -> None:
        """Take in ``N`` steps, in their order.

        Args:
            batches: Mean and variance of each channel in the steps' batches, ``(N, 2, C)``.
            running: Running statistics before each, ``(N, 2, C)``.
            counted: Channels for which both are known, ``(N, C)``.
            layers: Some layers, by number, whose channels alone the others then hold. All by default.
        """
        first, end, _ = layers.indices(len(self._sizes))
        channels, sizes = slice(self._starts[first], self._starts[end]), self._sizes[layers]
        eps, layer_of = self._eps[channels], self._layer_of[channels] - first
        counted = counted & (batches + running).sum(1).isfinite()
        if not bool(counted.any()):
            return
        if not bool(counted.all()):  # seldom
            batches, running = (torch.where(counted[:, None], part, 1.0) for part in (batches, running))
        steps = self._steps[channels] + counted.cumsum(0) - counted.to(eps)  # that count before each, (N, C)
        seen, before = (_logged(part, 1) for part in (batches, running))
        alive = ~is_dead(batches[:, 1], eps) & ~is_dead(running[:, 1], eps)
        taught = counted & (steps > 0) & alive

        errors = eps.new_empty(2, len(SPANS) + 1, len(batches) + 1, len(eps))  # the last row is what comes after them
        errors[:, :-1, 0] = self._averages[..., channels]
        errors[:, -1, :-1] = before.transpose(0, 1)
        for step, gain in enumerate(self._gains(steps, counted)):
            torch.lerp(errors[:, :-1, step], seen[step, :, None], gain, out=errors[:, :-1, step + 1])
        self._averages[..., channels] = errors[:, :-1, -1]
        self._steps[channels] = steps[-1] + counted[-1]
        errors = errors[:, :, :-1]
        errors -= seen.transpose(0, 1)[:, None]

        numbers = torch.stack([part.sum(1) for part in taught.split(sizes, 1)], 1).to(eps)  # of channels, (N, L)
        teaches = (numbers > 0).to(eps)
        kept = _DISCOUNT ** (teaches.sum(0) - teaches.cumsum(0))  # of each step at the end, (N, L)
        left = _DISCOUNT ** teaches.sum(0)  # of what was before
        scale = taught * kept.sqrt().index_select(1, layer_of)
        scale = torch.stack([scale * torch.exp(-0.5 * seen[:, 1]), scale])[:, None]
        parts = zip(errors.split(sizes, -1), scale.split(sizes, -1), strict=True)
        flat = ((part * factor).flatten(2) for part, factor in parts)
        products = torch.stack([part @ part.mT for part in flat], 1)
        self._products[:, layers] = left[:, None, None] * self._products[:, layers] + products
        self._weight[layers] = left * self._weight[layers] + (kept * numbers).sum(0)

    def _gains(self, steps: Tensor, counted: Tensor) -> Sequence[Tensor]:
        """What each step's batch weighs in the averages after it: ``N`` of ``(K - 1, C)``, or of ``(K - 1, 1)``."""
        if bool((counted == counted[:, :1]).all() & (steps[0] == steps[0, 0]).all()):
            steps, counted = steps[:, :1], counted[:, :1]  # channels mostly have one past, and that is less to compute
        return torch.where(counted, (1 - self._decay) / (1 - self._decay ** (steps + 1)), 0.0).unbind(1)

    def forecast(self, running: Tensor) -> Forecast:
        """What to expect of the next batch.

        Args:
            running: Running statistics now, ``(2, C)``; they are the forecast of a layer without a past.
        """
        weights, error = self._weights()
        expected = (weights[..., self._layer_of] * self._candidates(running)).sum(1)
        between = 1 + error[0, self._layer_of].nan_to_num(0.0).square()
        known = error[0].isfinite()[self._layer_of]
        mean, var = torch.where(known, torch.stack([expected[0], expected[1].exp() * between]), running)
        return Forecast(mean, var, error)

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, as tensors on the CPU."""
        return {name: getattr(self, f"_{name}").cpu().clone() for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: If it is that of other layers.
        """
        for name in _STATE:
            if state[name].shape != getattr(self, f"_{name}").shape:
                raise ValueError("the layers were others, or had other numbers of channels.")
        for name in _STATE:
            setattr(self, f"_{name}", state[name].to(self._eps))

    def _candidates(self, running: Tensor) -> Tensor:
        """Averages over the spans, and the running statistics: means and log variances, ``(2, K, C)``."""
        averages = self._averages
        poisoned = ~running.isfinite().all(0)  # by a NaN batch, for ever
        return torch.cat([averages, torch.where(poisoned, averages[:, -1], _logged(running))[:, None]], 1)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Weight of each candidate, ``(2, K, L)``, and the error that they would have made, ``(2, L)``."""
        known = self._weight.cpu() > 0
        products = (self._products.cpu() / self._weight.cpu().clamp(min=1)[:, None, None]).double()
        own = products.diagonal(dim1=-2, dim2=-1)
        least = own.amin(-1, keepdim=True).clamp(min=1e-12)
        best = torch.zeros_like(own).scatter_(-1, own.argmin(-1, keepdim=True), 1.0)[..., None]
        pull = _RIDGE * least[..., None]
        system = products + pull * torch.eye(products.shape[-1], dtype=products.dtype)
        free, ones = torch.linalg.solve(system, torch.cat([pull * best, torch.ones_like(best)], -1)).unbind(-1)
        weights = free + ones * ((1 - free.sum(-1)) / ones.sum(-1))[..., None]
        error = (weights[..., None, :] @ products @ weights[..., None])[..., 0, 0].clamp(min=0).sqrt()
        return weights.mT.to(self._eps), torch.where(known, error, torch.nan).to(self._eps)


_STATE = ("averages", "steps", "products", "weight")


def _logged(statistics: Tensor, dim: int = 0) -> Tensor:
    mean, var = statistics.unbind(dim)
    return torch.stack([mean, var.clamp(min=_SMALLEST_VARIANCE).log()], dim)
