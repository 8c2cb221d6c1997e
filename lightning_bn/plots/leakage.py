"""Correlation of the samples that are normalized together, by layer."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_bn.plots.style import BATCHES, DARK, EMA, new_figure, short_names, styled


@styled
def leakage_by_layer(icc: Mapping[str, float], *, noise: Mapping[str, float], p_value: float) -> Figure:
    """Draws the correlation of samples that each layer normalizes together, with the range expected by chance.

    Args:
        icc: Layer name -> intra-class correlation, in the order of the network.
        noise: Layer name -> its standard deviation without leakage. The bar spans three of these in both directions.
        p_value: p-value of the run so far, printed in the title.
    """
    figure = new_figure(6.8, 1.6 + 0.24 * min(len(icc), 60))
    axes = figure.add_subplot()
    names, rows = list(icc), np.arange(len(icc))
    widths = np.array([3 * noise[name] for name in names])
    axes.barh(rows, 2 * widths, left=-widths, color=BATCHES, alpha=0.35, label="3 sigma of random batches")
    axes.plot([icc[name] for name in names], rows, "o", color=EMA, label="measured", clip_on=False)
    axes.axvline(0, color=DARK, linewidth=0.8)
    every = max(1, -(-len(names) // 60))
    axes.set_yticks(rows[::every], short_names(names)[::every], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("intra-class correlation of normalization batches")
    axes.set_title(f"Do batches leak? p = {p_value:.2g}")
    axes.legend(loc="best", fontsize=9)
    return figure
