"""A forecast of the population statistics of the current weights, from training steps: no forward and no data.

The batch statistics of the last 32 steps are recovered (`running_stats`) only when a forecast is made (`forecast`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.gaps import mean_gap, var_gap
from lightning_bn.core.population import LayerStatistics, PopulationStatistics
from lightning_bn.core.ranks import broadcast_from_rank_zero, get_rank
from lightning_bn.tracking.drift import is_dead
from lightning_bn.tracking.forecast import Forecast, Steps, forecast_statistics
from lightning_bn.tracking.recovery import MAX_ERROR, recovery_error
from lightning_bn.tracking.running_stats import Snapshot, StepRecorder

STEPS = 32
"""Steps in a forecast. In its regression the oldest one weighs 4 % of the newest."""

_CHANNELS_AT_ONCE = 2048
"""Channels, in whole layers, that are forecast together, to bound memory."""

_INACCURATE = "means of many sigma"
"""Rounding then hides the batch statistics."""


class StatisticsForecaster:
    """Records training steps and forecasts the statistics of the weights after the last one.

    The first rank records, because DistributedDataParallel broadcasts its running statistics. All ranks get its
    forecast. The steps take 512 bytes per channel in float32, and a forecast about 25 MB.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._recorder = StepRecorder(layers)
        self._steps: deque[Snapshot] = deque(maxlen=STEPS)
        wide = [layer.get_buffer("running_mean").element_size() > 2 for layer in layers.values()]
        self._wide = torch.tensor(wide).to(self._recorder.eps.device)[self._recorder.layer_of]
        self._check = True
        self._latest: tuple[Tensor, Forecast] | None = None  # of these running statistics, since the last step

    def before_batch(self) -> None:
        if get_rank() == 0:
            self._recorder.before_batch(self._check)

    def after_batch(self) -> None:
        """End a step; skip the call for a batch that failed."""
        snapshot = self._recorder.after_batch()
        if snapshot is not None:
            self._steps.append(snapshot)
            self._check, self._latest = False, None

    def abandon(self) -> None:
        self._recorder.abandon()

    def left(self) -> dict[str, str]:
        """Return the layers that can have no forecast, and why, as the first rank knows it."""
        known = broadcast_from_rank_zero(self._recoverable().to(self._recorder.eps)).split(self._recorder.sizes)
        unknown = [name for name, part in zip(self._recorder.layers, known, strict=True) if not part.all()]
        return {name: self._recorder.untrusted.get(name, _INACCURATE) for name in unknown}

    def statistics(self) -> PopulationStatistics:
        """Forecast every layer with two steps that were recovered accurately."""
        return self._forecast()[0]

    def ema_gaps(self) -> dict[str, float]:
        """Return the larger of mean gap and variance gap from running statistics to the forecast, for its layers.

        Dead channels do not count. The gap is NaN where running statistics are not finite.
        """
        forecast, running = self._forecast()
        gaps = {}
        for (name, layer), (mean, var) in zip(self._recorder.layers.items(), running, strict=True):
            if name in forecast:
                alive, expected = ~is_dead(var, layer.eps), forecast[name]
                mean, var, means, variances = (v[alive] for v in (mean, var, expected.mean, expected.var))
                both = torch.stack([mean_gap(means, mean, var), var_gap(variances, var)])
                gaps[name] = float(both.amax()) if alive.any() else 0.0
        return gaps

    def state_dict(self) -> dict[str, Any]:
        """Return the last steps, with tensors on the CPU; empty on other ranks than the first."""
        if get_rank() != 0:
            return {}
        steps = [{key: v.cpu() if isinstance(v, Tensor) else v for key, v in s._asdict().items()} for s in self._steps]
        return {"sizes": list(self._recorder.sizes), "steps": steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state and state["sizes"] != self._recorder.sizes:
            raise ValueError("the layers were others, or had other numbers of channels.")
        device = self._recorder.eps.device
        self._latest = None
        for step in state.get("steps", ()):
            values: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in step.items()}
            self._steps.append(Snapshot(**values))

    def _forecast(self) -> tuple[PopulationStatistics, list[Tensor]]:
        self.abandon()  # a step that never ended
        self._check = True  # the forecast waits for the device in any case
        recorder, running = self._recorder, self._recorder.running()
        if self._latest is None or not torch.equal(self._latest[0], running):
            parts = [self._forecast_part(running, layers) for layers in _parts(recorder.starts)]
            self._latest = running, Forecast(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))
        mean, var, error = self._latest[1]
        known = error[0].isfinite()[recorder.layer_of] & self._recoverable()
        shared = broadcast_from_rank_zero(torch.stack([mean, var, *running, known.to(mean)])).split(recorder.sizes, 1)
        forecast = {}
        for name, (mean, var, *_, known) in zip(recorder.layers, shared, strict=True):
            if known.all():
                unknown = torch.tensor(torch.nan).expand(len(mean))
                forecast[name] = LayerStatistics(mean, var, 0, 0, unknown, unknown)
        return PopulationStatistics(forecast, 0, 0, 0), [part[2:4] for part in shared]

    def _forecast_part(self, running: Tensor, layers: slice) -> Forecast:
        recorder = self._recorder
        channels = slice(recorder.starts[layers.start], recorder.starts[layers.stop])
        running, eps, sizes = running[:, channels], recorder.eps[channels], recorder.sizes[layers]
        if not self._steps:
            return Forecast(running[0], running[1], running.new_full((2, len(sizes)), torch.nan))
        step = recorder.recover(list(self._steps), layers)
        mean, var = step.before.unbind(1)
        accurate = (recovery_error(mean, var, step.decay) < MAX_ERROR) | is_dead(var, eps)
        known = step.called & accurate & self._wide[channels]
        return forecast_statistics(Steps(step.batch, step.before, known), running, eps, sizes)

    def _recoverable(self) -> Tensor:
        recorder = self._recorder
        inaccurate = torch.stack([p.any() for p in (recorder.recovery_errors() > MAX_ERROR).split(recorder.sizes)])
        trusted = torch.tensor([name not in recorder.untrusted for name in recorder.layers])
        return (~inaccurate & trusted.to(inaccurate.device))[recorder.layer_of]


def _parts(starts: Sequence[int]) -> Iterator[slice]:
    first, number = 0, len(starts) - 1
    for layer in range(1, number):
        if starts[layer + 1] - starts[first] > _CHANNELS_AT_ONCE:
            yield slice(first, layer)
            first = layer
    yield slice(first, number)
