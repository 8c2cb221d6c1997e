"""Figures, and how each logger receives them.

A figure function takes numbers and returns a matplotlib `Figure` that needs no display and leaves no pyplot state.
"""

from typing import TYPE_CHECKING

from lightning_bn.lazy import lazily

_MODULES = {
    "channels": ["ChannelTrace", "channels_over_steps"],
    "drift": ["aggregates_over_steps", "drift_overview", "gap_heatmap"],
    "lag": ["lag_against_noise"],
    "leakage": ["leakage_by_layer"],
    "loggers": [
        *("alert", "any_logs", "log_figure", "log_layer_names", "log_line_chart", "log_table", "summarize_by_max"),
    ],
    "monitor": ["overview_of", "pictures_of"],
    "style": ["save_png", "to_rgb"],
}
__all__ = sorted(name for names in _MODULES.values() for name in names)  # type checkers see the names below

if TYPE_CHECKING:
    from lightning_bn.plots.channels import ChannelTrace as ChannelTrace
    from lightning_bn.plots.channels import channels_over_steps as channels_over_steps
    from lightning_bn.plots.drift import aggregates_over_steps as aggregates_over_steps
    from lightning_bn.plots.drift import drift_overview as drift_overview
    from lightning_bn.plots.drift import gap_heatmap as gap_heatmap
    from lightning_bn.plots.lag import lag_against_noise as lag_against_noise
    from lightning_bn.plots.leakage import leakage_by_layer as leakage_by_layer
    from lightning_bn.plots.loggers import alert as alert
    from lightning_bn.plots.loggers import any_logs as any_logs
    from lightning_bn.plots.loggers import log_figure as log_figure
    from lightning_bn.plots.loggers import log_layer_names as log_layer_names
    from lightning_bn.plots.loggers import log_line_chart as log_line_chart
    from lightning_bn.plots.loggers import log_table as log_table
    from lightning_bn.plots.loggers import summarize_by_max as summarize_by_max
    from lightning_bn.plots.monitor import overview_of as overview_of
    from lightning_bn.plots.monitor import pictures_of as pictures_of
    from lightning_bn.plots.style import save_png as save_png
    from lightning_bn.plots.style import to_rgb as to_rgb
else:  # type checkers take any name from a module that has a __getattr__
    __getattr__, __dir__ = lazily(__name__, {name: module for module, names in _MODULES.items() for name in names})
