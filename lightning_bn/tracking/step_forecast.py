"""Forecasting the population statistics of current weights from training steps: no forward and no data.

What each step's batch had is recovered from the running statistics before and after it (`functional.recover`), and what
the next one would have follows from these (`statistics.forecast`). A step only copies the running statistics; what
follows from them is worked out for many steps at once, when `AT_ONCE` have come together or a forecast is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.gaps import mean_gap, var_gap
from lightning_bn.core.population import LayerStatistics, PopulationStatistics
from lightning_bn.core.ranks import broadcast_from_rank_zero, get_rank
from lightning_bn.layers.behavior import Handle
from lightning_bn.tracking.drift import is_dead
from lightning_bn.tracking.forecast import RidgeForecaster
from lightning_bn.tracking.observed import Observed
from lightning_bn.tracking.recovery import MAX_ERROR, recovery_error
from lightning_bn.tracking.running_stats import Recovery, RunningStatsBeforeAfter
from lightning_bn.tracking.trusted import not_trusted, to_be_checked

AT_ONCE = 32
"""Steps that are kept until they are taken in together."""

_CHANNELS_AT_ONCE = 2048
"""Channels, in whole layers, that are taken in together: bounds the memory of that,."""


_INACCURATE = "means of many sigma"
"""From which rounding hides what a batch had."""


class StatisticsForecaster:
    """Watches training steps and forecasts the statistics of the weights that the last one has left.

    With several ranks the first one watches, since its running statistics are those that every rank's forward starts
    from (DistributedDataParallel hands them round); all ranks get its forecast.

    Memory: copies of the running statistics around up to 32 steps, 512 bytes a channel in float32; 13 float64 numbers
    a channel and 99 a layer; and for a moment about 25 MB, or 12 kB a channel of a layer that has more than 2,048.

    Args:
        layers: Qualified name -> layer; each stores running statistics.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> bn = nn.BatchNorm1d(1)
        >>> forecast = StatisticsForecaster({"bn": bn})
        >>> for _ in range(10):
        ...     forecast.before_batch()
        ...     _ = bn(torch.tensor([[4.0], [6.0]]))
        ...     forecast.after_batch()
        >>> bn.running_mean, forecast.statistics()["bn"].mean.round(decimals=3)
        (tensor([3.2566]), tensor([5.], dtype=torch.float64))
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._recovery = Recovery(layers)
        self._forecaster = RidgeForecaster(self._recovery.sizes, self._recovery.eps)
        wide = [layer.get_buffer("running_mean").element_size() > 2 for layer in layers.values()]
        self._wide = torch.tensor(wide).to(self._recovery.eps.device)[self._recovery.layer_of]
        self._parts = _parts(self._recovery.sizes, _CHANNELS_AT_ONCE)
        self._pending: list[RunningStatsBeforeAfter] = []
        self._observed = Observed(layers)
        self._checking: tuple[Handle, set[str]] | None = None
        self._not_trusted: dict[str, str] = {}
        self._closely = True

    def before_batch(self) -> None:
        """Call right before a batch reaches the model."""
        self.abandon()
        if get_rank() != 0:
            return
        layers = to_be_checked(self._recovery.layers) if self._closely else {}
        checked = {name: layer for name, layer in layers.items() if name not in self._not_trusted}
        self._observed.begin()
        self._checking = Handle(checked.values(), self._observed), set(checked)
        self._recovery.before_batch(self._closely)

    def after_batch(self) -> None:
        """Call right after it, or never: a batch that failed leaves no trace."""
        around = self._recovery.after_batch()
        if around is None or self._checking is None:
            return
        _, checked = self._checking
        self.abandon()
        if checked:
            self._not_trusted |= not_trusted(self._recovery, around, checked, self._observed)
        self._closely = False
        self._pending.append(around)
        if len(self._pending) == AT_ONCE:
            self._take_in()

    def abandon(self) -> None:
        """Take back from the layers what a batch was given, whether or not it came to its end."""
        if self._checking is not None:
            self._checking[0].undo()
        self._checking = None
        self._recovery.abandon()

    def left(self) -> dict[str, str]:
        """Layers that have no forecast, whatever steps were seen, and why: those of the first rank."""
        known = broadcast_from_rank_zero(self._is_known().to(self._recovery.eps)).split(self._recovery.sizes)
        unknown = [name for name, part in zip(self._recovery.layers, known, strict=True) if not part.all()]
        return {name: self._not_trusted.get(name, _INACCURATE) for name in unknown}

    def statistics(self) -> PopulationStatistics:
        """The forecast, for every layer that has one: of which two steps were seen, and recovered accurately."""
        return self._look()[0]

    def ema_gaps(self) -> dict[str, float]:
        """How far the running statistics of a layer lie from its forecast; for every layer that has one.

        The larger of the mean gap (sigma) and the variance gap (log ratio), over channels that are not dead; NaN where
        running statistics are not finite.
        """
        forecast, running = self._look()
        gaps = {}
        for (name, layer), (mean, var) in zip(self._recovery.layers.items(), running, strict=True):
            if name in forecast:
                on = ~is_dead(var, layer.eps)
                found = forecast[name]
                both = mean_gap(found.mean[on], mean[on], var[on]), var_gap(found.var[on], var[on])
                gaps[name] = float(torch.stack(both).amax()) if on.any() else 0.0
        return gaps

    def state_dict(self) -> dict[str, Any]:
        """What was seen, in tensors on the CPU: on the first rank, the others having seen nothing."""
        self._take_in()
        return self._forecaster.state_dict() if get_rank() == 0 else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: If it is that of other layers.
        """
        self._forecaster.load_state_dict(state)
        self._pending = []

    def _take_in(self) -> None:
        """Work out what the steps were that came since the last time."""
        for layers, channels in self._parts if self._pending else ():
            step, eps = self._recovery.recover(self._pending, layers), self._recovery.eps[channels]
            mean, var = step.before.unbind(1)
            accurate = (recovery_error(mean, var, step.kept) < MAX_ERROR) | is_dead(var, eps)
            counted = step.called & accurate & self._wide[channels]
            self._forecaster.update(step.batch, step.before, counted, layers)
        self._pending = []

    def _look(self) -> tuple[PopulationStatistics, list[tuple[Tensor, Tensor]]]:
        """The forecast, and mean and variance of each layer's running statistics: those of the first rank."""
        self.abandon()  # a step that never ended
        self._take_in()
        running = self._recovery.running()
        mean, var, error = self._forecaster.forecast(running)
        self._closely = True  # at the next step: what is asked for once in a while may wait for the device
        known = error[0].isfinite()[self._recovery.layer_of] & self._is_known()
        shared = broadcast_from_rank_zero(torch.stack([mean, var, *running, known.to(mean)]))
        layers = list(zip(self._recovery.layers, shared.split(self._recovery.sizes, 1), strict=True))
        unknown = torch.tensor(torch.nan)
        forecast = {
            name: LayerStatistics(part[0], part[1], 0, 0, unknown.expand(part.shape[1]), unknown.expand(part.shape[1]))
            for name, part in layers
            if bool(part[4].all())
        }
        return PopulationStatistics(forecast, 0, 0, 0), [(part[2], part[3]) for _, part in layers]

    def _is_known(self) -> Tensor:
        """Of each channel, whether its layer can be recovered, and accurately in all of its channels, ``(C,)``."""
        too_much = self._recovery.inaccuracy() > MAX_ERROR
        inaccurate = torch.stack([part.any() for part in too_much.split(self._recovery.sizes)])
        trusted = torch.tensor([name not in self._not_trusted for name in self._recovery.layers])
        return (~inaccurate & trusted.to(inaccurate.device))[self._recovery.layer_of]


def _parts(sizes: Sequence[int], most: int) -> list[tuple[slice, slice]]:
    """Consecutive layers of at most so many channels together, or one that has more: which, and their channels."""
    parts: list[tuple[slice, slice]] = []
    channel = 0
    for layer, size in enumerate(sizes):
        if parts and channel + size - parts[-1][1].start <= most:
            layers, channels = parts.pop()
            parts.append((slice(layers.start, layer + 1), slice(channels.start, channel + size)))
        else:
            parts.append((slice(layer, layer + 1), slice(channel, channel + size)))
        channel += size
    return parts
