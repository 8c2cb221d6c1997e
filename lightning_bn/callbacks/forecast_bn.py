"""ForecastBN: evaluation uses a forecast of the population statistics, made from the training steps alone."""

from __future__ import annotations

from lightning_bn.callbacks.recompute import RecomputeCallback
from lightning_bn.layers.find import Layers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.forecasting import TrainerForecast
from lightning_bn.trainer.passes import PassResult


class ForecastBNCallback(RecomputeCallback):
    r"""Forecast the population statistics of Sec. 3.2 before each validation, without a forward pass or data.

    Batch statistics follow from the running mean before and after a step, $\mu_B = (r_1 - (1 - m)\, r_0) / m$. A ridge
    regression on those of recent steps predicts the next ones. Layers where this is inaccurate keep their running
    statistics, with a warning.

    It helps where `PreciseBNCallback` helps, if a pass is too slow or data cannot be read twice.
    It does not help a converged model, and is less accurate than PreciseBN.
    Cost: arithmetic over all channels in each training step.

    Args:
        every_n_validations: Write before every n-th validation only.
        layers: Glob patterns over qualified layer names, such as ``"backbone.*"``; None for every layer that is not
            frozen.

    Attributes:
        result: The last forecast, or None.
        on_error: ``"warn"``: if a later forecast fails, warn, keep the running statistics, and log
            ``forecast_bn/failed``. ``"raise"`` ends the fit. Set it on the callback.

    Raises:
        ValueError: At fit start: no layer to forecast, averaged weights, or a conflicting callback.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import ForecastBNCallback
        >>> trainer = Trainer(callbacks=[ForecastBNCallback()], logger=False, enable_checkpointing=False)
    """

    kind = "forecast"
    prefix = "forecast_bn"

    def __init__(self, every_n_validations: int = 1, *, layers: Layers = None) -> None:
        super().__init__(layers, every_n_validations)
        self._forecast: TrainerForecast = TrainerForecast(layers, type(self).__name__, "use PreciseBNCallback for them")

    def _skip_reason(self, context: PassContext) -> str:
        return self._forecast.skip_reason(context)

    def _recompute(self, context: PassContext) -> PassResult:
        return self._forecast.run(context)
