"""Figures, and how each logger takes them.

A figure function takes numbers and returns a matplotlib `Figure`; it knows no model and no Trainer.
`log_figure` is the one function that knows loggers. Everything is drawn with the Agg canvas: no display, no
pyplot state, safe in callbacks.
"""

from typing import TYPE_CHECKING

from lightning_bn.lazy import lazily

__all__ = [
    "ChannelTrace",
    "DepthProfile",
    "LeakageCurves",
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
    "leakage_curves",
    "log_figure",
    "log_layer_names",
    "log_line_chart",
    "log_table",
    "overview_of",
    "pictures_of",
    "save_png",
    "summarize_by_max",
    "to_rgb",
    "wandb_workspace",
]

if TYPE_CHECKING:
    from lightning_bn.plots.channels import ChannelTrace, channels_over_steps
    from lightning_bn.plots.curves import SampleSweep, error_against_samples, error_curves
    from lightning_bn.plots.depth import DepthProfile, gaps_in_depth
    from lightning_bn.plots.drift import aggregates_over_steps, drift_overview, gap_heatmap, lag_against_noise
    from lightning_bn.plots.leakage import LeakageCurves, leakage_by_layer, leakage_curves
    from lightning_bn.plots.loggers import (
        alert,
        any_logs,
        log_figure,
        log_layer_names,
        log_line_chart,
        log_table,
        summarize_by_max,
    )
    from lightning_bn.plots.monitor import overview_of, pictures_of
    from lightning_bn.plots.style import save_png, to_rgb
    from lightning_bn.plots.workspace import wandb_workspace
else:  # type checkers take any name from a module that they see a __getattr__ of
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "ChannelTrace": "channels",
            "DepthProfile": "depth",
            "LeakageCurves": "leakage",
            "SampleSweep": "curves",
            "aggregates_over_steps": "drift",
            "alert": "loggers",
            "any_logs": "loggers",
            "channels_over_steps": "channels",
            "drift_overview": "drift",
            "error_against_samples": "curves",
            "error_curves": "curves",
            "gap_heatmap": "drift",
            "gaps_in_depth": "depth",
            "lag_against_noise": "drift",
            "leakage_by_layer": "leakage",
            "leakage_curves": "leakage",
            "log_figure": "loggers",
            "log_layer_names": "loggers",
            "log_line_chart": "loggers",
            "log_table": "loggers",
            "overview_of": "monitor",
            "pictures_of": "monitor",
            "save_png": "style",
            "summarize_by_max": "loggers",
            "to_rgb": "style",
            "wandb_workspace": "workspace",
        },
    )
