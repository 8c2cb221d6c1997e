"""The pass that is none: statistics forecast from the training steps of a fit, in the place of a `PopulationPass`."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.population import PopulationStatistics
from lightning_bn.functional.precise import write_running_stats
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.tracking.running_stats import not_recoverable
from lightning_bn.tracking.step_forecast import StatisticsForecaster
from lightning_bn.trainer.compat import weight_averagers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.passes import PassResult, check_sharding, gaps_from_running_stats


class TrainerForecast:
    """Forecasts, within a fit, the population statistics of the weights as they are.

    Args:
        layers: Glob patterns over the layers to forecast.
    """

    def __init__(self, layers: Layers) -> None:
        as_patterns(layers)  # refuses what is none
        self._layers = layers
        self._forecast: StatisticsForecaster | None = None
        self._state: dict[str, Any] = {}
        self._left: set[str] = set()

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse at the start what could not be done later, naming the way out; begin, or go on.

        Raises:
            ValueError: If no layer's batch statistics can be recovered, or if other weights are evaluated than those
                that are trained.
            RuntimeError: For a strategy that shards the model.
        """
        check_sharding(trainer)
        others = [*weight_averagers(trainer), *(o for o in trainer.optimizers if callable(getattr(o, "eval", None)))]
        if others:
            raise ValueError(
                f"{type(others[0]).__name__} evaluates other weights than those that are trained. No training step has "
                f"run them, so their statistics cannot be forecast: {_WAY_OUT}."
            )
        layers = storing_layers(module, self._layers)
        reasons = {name: not_recoverable(layer) for name, layer in layers.items()}
        left = {name: reason for name, reason in reasons.items() if reason not in ("", "frozen")}
        if left and "" not in reasons.values():
            name, reason = next(iter(left.items()))
            raise ValueError(
                f"What batches were cannot be recovered from the running statistics of any layer ({name!r}: {reason}), "
                f"so there is nothing to forecast from: {_WAY_OUT}."
            )
        self._forecast = StatisticsForecaster(layers)
        self._say_left(left)
        if self._state:
            try:
                self._forecast.load_state_dict(self._state)
            except ValueError as error:
                rank_zero_warn(f"PreciseBNCallback begins a new forecast: {error}")

    def begin(self) -> None:
        """Reset the state."""
        self._forecast, self._state, self._left = None, {}, set()

    def before_batch(self) -> None:
        """Call right before a training batch."""
        if self._forecast:
            self._forecast.before_batch()

    def after_batch(self) -> None:
        """Call right after it."""
        if self._forecast:
            self._forecast.after_batch()

    def abandon(self) -> None:
        """Leave no layer watched, should its batch have been skipped, or have failed."""
        if self._forecast:
            self._forecast.abandon()

    def skip_reason(self, trainer: Trainer, module: LightningModule) -> str:
        """Why there is nothing to write now; empty if there is."""
        estimable = self._estimable(trainer, module)
        if not estimable:
            return "all of its layers are frozen"
        if self._now(trainer, module):
            return ""
        assert self._forecast is not None  # check saw to it
        left = self._forecast.left()
        if set(left) >= set(estimable):
            name = next(iter(estimable))
            return f"none of its layers can be forecast ({name!r}: {left[name]}). Or {_WAY_OUT}"
        return "a forecast takes two training steps, and they were not yet seen"

    def run(self, trainer: Trainer, module: LightningModule) -> PassResult:
        """Write the forecast; layers without one keep their running statistics."""
        started = time.perf_counter()
        layers, statistics = self._estimable(trainer, module), self._now(trainer, module)
        assert self._forecast is not None  # check saw to it
        self._say_left(self._forecast.left())
        moved = {name: gaps_from_running_stats(layers[name], forecast) for name, forecast in statistics.items()}
        write_running_stats(layers, statistics)
        return PassResult(statistics, moved, time.perf_counter() - started)

    def ema_gap(self, trainer: Trainer, module: LightningModule) -> float:
        """The largest of the layers' `ema_gaps`; infinite if a layer has no forecast, or has lost its statistics."""
        assert self._forecast is not None  # check saw to it
        gaps = self._forecast.ema_gaps()
        found = [gaps.get(name, math.inf) for name in self._estimable(trainer, module)]
        return max((math.inf if math.isnan(gap) else gap for gap in found), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        """What was seen, in plain types and tensors."""
        return self._forecast.state_dict() if self._forecast else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; `check` goes on from there."""
        self._state = dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has what was seen, not the hold on layers."""
        return {**vars(self), "_forecast": None, "_state": self.state_dict()}

    def _estimable(self, trainer: Trainer, module: LightningModule) -> dict[str, _BatchNorm]:
        return PassContext.of(trainer, module, self._layers).layers

    def _now(self, trainer: Trainer, module: LightningModule) -> PopulationStatistics:
        assert self._forecast is not None  # check saw to it
        estimable, forecast = self._estimable(trainer, module), self._forecast.statistics()
        kept = {name: found for name, found in forecast.items() if name in estimable}
        return PopulationStatistics(kept, 0, 0, 0)

    def _say_left(self, reasons: dict[str, str]) -> None:
        new = [name for name in reasons if name not in self._left]
        if new:
            self._left.update(new)
            rank_zero_warn(
                f"PreciseBNCallback cannot forecast {', '.join(map(repr, new))} ({reasons[new[0]]}): source='training' "
                f"leaves the running statistics as they are there, and when_needed skips no pass. Or {_WAY_OUT}."
            )


_WAY_OUT = "use source='train_dataloader', without when_needed"
