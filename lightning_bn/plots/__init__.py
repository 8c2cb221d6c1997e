"""Figures, and how each logger takes them.

A figure function takes numbers and returns a matplotlib `Figure`; it knows no model and no Trainer.
`log_figure` is the one function that knows loggers. Everything is drawn with the Agg canvas: no display, no
pyplot state, safe in callbacks.
"""

from lightning_bn.plots.curves import SampleSweep, error_against_samples, error_curves
from lightning_bn.plots.loggers import log_figure
from lightning_bn.plots.population import ema_and_cloud
from lightning_bn.plots.style import save_png, to_rgb

__all__ = [
    "SampleSweep",
    "ema_and_cloud",
    "error_against_samples",
    "error_curves",
    "log_figure",
    "save_png",
    "to_rgb",
]
