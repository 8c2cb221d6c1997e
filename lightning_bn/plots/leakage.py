"""Intra-class correlation by layer: whether, and where in the network, batches are not random."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_bn.plots.style import BATCHES, EMA, new_figure, short_names, styled


@styled
def leakage_by_layer(icc: Mapping[str, float], noise: Mapping[str, float], *, p_value: float) -> Figure:
    """Correlation of the samples that each layer normalises together, on the band of what chance gives.

    Args:
        icc: Layer's name -> intra-class correlation, in the order of the network.
        noise: Layer's name -> its standard deviation without leakage; the band is three of these wide, up and down.
        p_value: Of the run so far, for the title.
    """
    figure = new_figure(6.8, 1.6 + 0.24 * min(len(icc), 60))
    axes = figure.add_subplot()
    names, places = list(icc), np.arange(len(icc))
    widths = np.array([3 * noise[name] for name in names])
    axes.barh(places, 2 * widths, left=-widths, color=BATCHES, alpha=0.35, label="3 sigma of random batches")
    axes.plot([icc[name] for name in names], places, "o", color=EMA, label="measured", clip_on=False)
    axes.axvline(0, color="#4D4D4D", linewidth=0.8)
    shown = places[:: max(1, -(-len(names) // 60))]
    axes.set_yticks(shown, [short_names(names)[i] for i in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("intra-class correlation of normalization batches")
    axes.set_title(f"Do batches leak? p = {p_value:.2g}")
    axes.legend(loc="best", fontsize=9)
    return figure
