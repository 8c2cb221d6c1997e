"""A forecast of the population statistics of the current weights, from the training steps of a Trainer."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.core.population import PopulationStatistics
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.tracking.forecast import StatisticsForecaster
from lightning_bn.tracking.recovery import not_recoverable
from lightning_bn.trainer.compat import weight_averagers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.passes import PassResult, check_sharding


class TrainerForecast:
    """Forecasts, within a fit, the population statistics of the current weights.

    ``owner``, the name of the callback, and ``alternative``, the advice if no forecast is possible, are for messages.
    """

    def __init__(self, layers: Layers, owner: str, alternative: str) -> None:
        as_patterns(layers)  # validates them
        self._layers, self._owner, self._alternative = layers, owner, alternative
        self._forecaster: StatisticsForecaster | None = None
        self._restored: dict[str, Any] = {}
        self._warned: set[str] = set()

    def reset(self) -> None:
        self._forecaster, self._restored, self._warned = None, {}, set()

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise if no forecast is possible; begin, or continue from a restored state."""
        check_sharding(trainer)
        others = [*weight_averagers(trainer), *(o for o in trainer.optimizers if callable(getattr(o, "eval", None)))]
        if others:
            raise ValueError(
                f"{self._owner}: {type(others[0]).__name__} evaluates other weights than those that are trained, and "
                f"statistics can only be forecast for the latter: {self._alternative}."
            )
        layers = storing_layers(module, self._layers)
        reasons = {name: not_recoverable(layer) for name, layer in layers.items()}
        unrecoverable = {name: reason for name, reason in reasons.items() if reason not in ("", "frozen")}
        if unrecoverable and "" not in reasons.values():
            name, reason = next(iter(unrecoverable.items()))
            raise ValueError(
                f"{self._owner}: batch statistics cannot be recovered from the running statistics of any layer "
                f"({name!r}: {reason}), so a forecast is not possible: {self._alternative}."
            )
        self._forecaster = StatisticsForecaster(layers)
        self._warn_of(unrecoverable)
        if self._restored:
            try:
                self._forecaster.load_state_dict(self._restored)
            except ValueError as error:
                rank_zero_warn(f"{self._owner} begins a new forecast: {error}")

    def before_batch(self) -> None:
        if self._forecaster:
            self._forecaster.before_batch()

    def after_batch(self) -> None:
        if self._forecaster:
            self._forecaster.after_batch()

    def abandon(self) -> None:
        """Detach from the layers; a batch that was skipped or failed does not count."""
        if self._forecaster:
            self._forecaster.abandon()

    def skip_reason(self, context: PassContext) -> str:
        """Return why there is no forecast to write now; empty if there is one."""
        if self._statistics(context):
            return ""
        assert self._forecaster is not None  # start has made it
        without = self._forecaster.left()
        if set(without) >= set(context.layers):
            name = next(iter(context.layers))
            return f"none of its layers can be forecast ({name!r}: {without[name]}): {self._alternative}"
        return "a forecast needs two training steps, and there were fewer"

    def run(self, context: PassContext) -> PassResult:
        """Write the forecast; layers without one keep their running statistics."""
        started = time.perf_counter()
        statistics = self._statistics(context)
        assert self._forecaster is not None  # start has made it
        self._warn_of(self._forecaster.left())
        return PassResult.write(context.layers, statistics, started)

    def ema_gap(self, context: PassContext) -> float:
        """Return the largest of the layers' `ema_gaps`; infinite without a forecast or finite statistics."""
        assert self._forecaster is not None  # start has made it
        gaps = self._forecaster.ema_gaps()
        of_layers = [gaps.get(name, math.inf) for name in context.layers]
        return max((math.inf if math.isnan(gap) else gap for gap in of_layers), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        return self._forecaster.state_dict() if self._forecaster else self._restored

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = dict(state)  # start continues from it

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forecaster": None, "_restored": self.state_dict()}

    def _statistics(self, context: PassContext) -> PopulationStatistics:
        assert self._forecaster is not None  # start has made it
        forecast = self._forecaster.statistics()
        return PopulationStatistics({n: s for n, s in forecast.items() if n in context.layers}, 0, 0, 0)

    def _warn_of(self, reasons: dict[str, str]) -> None:
        new = [name for name in reasons if name not in self._warned]
        if new:
            self._warned.update(new)
            rank_zero_warn(
                f"{self._owner} cannot forecast {', '.join(map(repr, new))} ({reasons[new[0]]}), which keep their "
                f"running statistics: {self._alternative}."
            )
