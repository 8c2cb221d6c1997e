"""How far statistics lie from the exact ones, layer by layer: what small normalization batches add up in depth."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_bn.plots.style import EMA, new_figure, styled

SMALLEST = 1e-6  # what rounding leaves of a gap of 0


class DepthProfile(NamedTuple):
    """One model's statistics from several sources, each as (mean gap, variance gap) of every layer in depth."""

    title: str
    gaps: Mapping[str, Sequence[tuple[float, float]]]  # as `PopulationStatistics.gaps_to` gives them, by source
    ema_gaps: Sequence[tuple[float, float]]


@styled
def gaps_in_depth(profiles: Sequence[DepthProfile]) -> Figure:
    """Mean gap (above) and variance gap (below) over the depth of the network; one column a model.

    A gap of 0, as of the first layer's statistics, has no place on the logarithmic axis and is left out.
    """
    figure = new_figure(1.4 + 3.4 * len(profiles), 5.4)
    panels = figure.subplots(2, len(profiles), sharex="col", sharey="row", squeeze=False)
    for column, profile in enumerate(profiles):
        shades = list(matplotlib.colormaps["Blues"](np.linspace(0.95, 0.4, len(profile.gaps))))
        sources = {**profile.gaps, "EMA": profile.ema_gaps}
        for (name, gaps), color in zip(sources.items(), [*shades, EMA], strict=True):
            for axes, over_layers in zip(panels[:, column], np.asarray(gaps, dtype=float).T, strict=True):
                shown = np.where(over_layers > SMALLEST, over_layers, np.nan)
                axes.plot(np.arange(1, len(shown) + 1), shown, marker=".", color=color, label=name)
                axes.set_yscale("log")
        panels[0, column].set_title(profile.title)
        panels[1, column].set_xlabel("BatchNorm layer, in depth")
        panels[1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0, 0].set_ylabel("mean gap (sigma)")
    panels[1, 0].set_ylabel("variance gap (log ratio)")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9)
    return figure
