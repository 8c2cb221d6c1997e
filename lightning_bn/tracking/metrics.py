"""Gaps between batch statistics and the EMA as `torchmetrics.Metric` classes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_bn.core.gaps import mean_offsets, var_offsets
from lightning_bn.core.moments import Moments
from lightning_bn.tracking.drift import is_dead, split


class _OfStatistics(Metric):
    is_differentiable = False
    full_state_update = False


class _Gap(_OfStatistics):
    offsets: Tensor

    def __init__(self, channels: int, *, part: Literal["gap", "lag", "noise"] = "gap", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if part not in ("gap", "lag", "noise"):
            raise ValueError(f"part must be 'gap', 'lag' or 'noise' but is {part!r}.")
        self.part = part
        self.add_state("offsets", torch.zeros(3, channels, dtype=torch.float64), dist_reduce_fx=_merge)

    def update(self, mean: Tensor, var: Tensor, ema_mean: Tensor, ema_var: Tensor) -> None:
        offsets = self._offsets_of(*(v.to(self.offsets) for v in (mean, var, ema_mean, ema_var)))
        if offsets.shape != self.offsets[0].shape:
            raise ValueError(
                f"{type(self).__name__} was made for {self.offsets.shape[1]} channels, and was given statistics of "
                f"shape {tuple(mean.shape)}."
            )
        self.offsets = _merge([self.offsets, torch.stack([torch.ones_like(offsets), offsets, 0 * offsets])])

    def compute(self) -> Tensor:
        drift = split(Moments(*self.offsets), [self.offsets.shape[1]])
        return getattr(drift, self.part)[0]  # type: ignore[no-any-return]

    @abstractmethod
    def _offsets_of(self, mean: Tensor, var: Tensor, ema_mean: Tensor, ema_var: Tensor) -> Tensor: ...


class MeanGap(_Gap):
    """Measure the distance of batch means from the EMA, in sigma.

    ``sqrt(mean(((mean - ema_mean) / sqrt(ema_var))^2))``, over channels and updates. Over one update all of it is lag.

    ``update`` takes four vectors, ``(C,)``: mean and variance of a batch, then mean and variance of the EMA before it.

    Args:
        channels: Number of channels of the layer.
        part: ``"gap"``; ``"lag"``, the part that all updates share; or ``"noise"``, their spread. ``gap^2 = lag^2 +
            noise^2``.
        kwargs: For `torchmetrics.Metric`.

    Raises:
        ValueError: If ``part`` is unknown, or an update has another number of channels.

    Example:
        >>> import torch
        >>> from torchmetrics import MetricCollection
        >>> from lightning_bn import MeanGap, VarGap
        >>> parts = {part: MeanGap(1, part=part) for part in ("lag", "noise")}
        >>> gaps = MetricCollection({**parts, "var_gap": VarGap(1)})
        >>> for mean in (0.5, 1.5):
        ...     gaps.update(torch.tensor([mean]), torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))
        >>> {name: value.item() for name, value in gaps.compute().items()}
        {'lag': 1.0, 'noise': 0.5, 'var_gap': 0.0}
    """

    def _offsets_of(self, mean: Tensor, var: Tensor, ema_mean: Tensor, ema_var: Tensor) -> Tensor:
        return mean_offsets(mean, ema_mean, ema_var)


class VarGap(_Gap):
    """Measure the distance of batch variances from the EMA, as a log ratio.

    ``sqrt(mean(log(var / ema_var)^2))``, over channels and updates. Both variances are unbiased, as running variances
    are. With few values per channel the lag is too large: the log of a batch variance is low by about ``1 / (values -
    1)``.

    Args:
        channels: Number of channels of the layer.
        part: ``"gap"``, ``"lag"`` or ``"noise"``, see `MeanGap`.
        kwargs: For `torchmetrics.Metric`.

    Raises:
        ValueError: If ``part`` is unknown, or an update has another number of channels.

    Example:
        >>> import torch
        >>> from lightning_bn import VarGap
        >>> gap = VarGap(channels=2)
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> gap.update(zero, 2 * one, zero, one)
        >>> gap.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    def _offsets_of(self, mean: Tensor, var: Tensor, ema_mean: Tensor, ema_var: Tensor) -> Tensor:
        return var_offsets(var, ema_var)


class DeadChannels(_OfStatistics):
    """Measure the fraction of channels with a variance below ``eps / 100``, over all updates; NaN before the first.

    Args:
        eps: The layer's eps.
        kwargs: For `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_bn import DeadChannels
        >>> dead = DeadChannels()
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> dead.update(zero, torch.tensor([0.0, 1.0]), zero, one)
        >>> dead.compute()
        tensor(0.5000)
    """

    dead: Tensor
    channels: Tensor

    def __init__(self, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eps = eps
        self.add_state("dead", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("channels", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, var: Tensor, ema_mean: Tensor, ema_var: Tensor) -> None:
        self.dead += is_dead(var, self.eps).sum()
        self.channels += var.numel()

    def compute(self) -> Tensor:
        return self.dead / self.channels


class NonFiniteChannels(_OfStatistics):
    """Measure the fraction of channels with a NaN or infinite statistic in any update, on any rank.

    Args:
        channels: Number of channels of the layer.
        kwargs: For `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_bn import NonFiniteChannels
        >>> bad = NonFiniteChannels(channels=2)
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> bad.update(torch.tensor([0.0, torch.inf]), one, zero, one)
        >>> bad.compute()
        tensor(0.5000)
    """

    seen: Tensor

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("seen", torch.zeros(channels), dist_reduce_fx="max")

    def update(self, mean: Tensor, var: Tensor, ema_mean: Tensor, ema_var: Tensor) -> None:
        finite = torch.stack([mean, var, ema_mean, ema_var]).isfinite().all(0)
        self.seen = self.seen.maximum((~finite).to(self.seen))

    def compute(self) -> Tensor:
        return self.seen.mean()


def _merge(states: Any) -> Tensor:
    first, *others = (Moments(*state) for state in states)
    return torch.stack(list(vars(sum(others, first)).values()))
