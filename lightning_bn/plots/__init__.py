"""Figures, and how each logger takes them.

A figure function takes numbers and returns a matplotlib `Figure`; it knows no model and no Trainer.
`log_figure` is the one function that knows loggers. Everything is drawn with the Agg canvas: no display, no
pyplot state, safe in callbacks.
"""

from lightning_bn.plots.channels import ChannelTrace, channels_over_steps
from lightning_bn.plots.curves import SampleSweep, error_against_samples, error_curves
from lightning_bn.plots.depth import DepthProfile, gaps_in_depth
from lightning_bn.plots.drift import aggregates_over_steps, drift_overview, gap_heatmap, lag_against_noise
from lightning_bn.plots.leakage import leakage_by_layer
from lightning_bn.plots.loggers import (
    alert,
    any_logs,
    log_figure,
    log_layer_names,
    log_line_chart,
    log_table,
    summarise_by_max,
)
from lightning_bn.plots.monitor import overview_of, pictures_of
from lightning_bn.plots.style import save_png, to_rgb
from lightning_bn.plots.workspace import wandb_workspace

__all__ = [
    "ChannelTrace",
    "DepthProfile",
    "SampleSweep",
    "aggregates_over_steps",
    "alert",
    "any_logs",
    "channels_over_steps",
    "drift_overview",
    "error_against_samples",
    "error_curves",
    "gap_heatmap",
    "gaps_in_depth",
    "lag_against_noise",
    "leakage_by_layer",
    "log_figure",
    "log_layer_names",
    "log_line_chart",
    "log_table",
    "overview_of",
    "pictures_of",
    "save_png",
    "summarise_by_max",
    "to_rgb",
    "wandb_workspace",
]
