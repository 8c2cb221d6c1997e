"""ForecastBN: evaluation uses a forecast of the population statistics, made from the training steps alone."""

from __future__ import annotations

from lightning_bn.callbacks.recompute import RecomputeCallback
from lightning_bn.layers.find import Layers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.forecasting import TrainerForecast
from lightning_bn.trainer.passes import PassResult


class ForecastBNCallback(RecomputeCallback):
    r"""Write forecast population statistics before each validation: no forward pass and no data.

    Each training step moves the running statistics by $r_1 = (1 - m)\, r_0 + m\, \mu_B$. So the batch statistics of a
    step follow from the running statistics before and after it, $\mu_B = (r_1 - (1 - m)\, r_0) / m$. A ridge
    regression on those of recent steps predicts the statistics of the next step, which are those of the current
    weights. Layers whose batch statistics cannot be recovered accurately keep their running statistics, with a warning.

    When it helps: as `PreciseBNCallback`, where a pass is too slow or data cannot be read twice. When it does not help:
    PreciseBN is more accurate; and once training has converged, the EMA is as good. The docs page has the figures.

    Args:
        every_n_validations: Write at every n-th validation only.
        layers: Glob patterns over qualified layer names, such as ``"backbone.*"``; None for every layer that is not
            frozen.

    Attributes:
        result: The last forecast, or None.
        on_error: ``"warn"``: if a forecast fails after a first one has succeeded, warn, keep the running statistics,
            count it as ``forecast_bn/failed`` and continue. ``"raise"`` ends the fit. Set it on the callback.

    Raises:
        ValueError: At fit start: no layer can be forecast, evaluation uses other weights than training (weight
            averaging, schedule-free optimizers), or another callback writes statistics into the same layers.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import ForecastBNCallback
        >>> trainer = Trainer(callbacks=[ForecastBNCallback()], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.ForecastBNCallback
              init_args: {layers: "backbone.*"}
        ```
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
