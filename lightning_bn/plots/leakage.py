"""Whether, and where in the network, batches are not random; and what that does to the error (the paper's Fig. 8)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_bn.plots.style import BATCHES, EMA, PRECISE, new_figure, short_names, styled


class LeakageCurves(NamedTuple):
    """A panel of Fig. 8: one way of putting training batches together. Errors in %, a list a seed, one an epoch."""

    title: str
    population: Sequence[Sequence[float]]
    mini_batch: Sequence[Sequence[float]]
    same_pattern: Sequence[Sequence[float]]
    alarms: Sequence[int] = ()  # epochs of BatchLeakageMonitor's alarms


@styled
def leakage_curves(panels: Sequence[LeakageCurves]) -> Figure:
    """Validation error with three kinds of statistics over the epochs (Fig. 8), one panel a training.

    Lines are means over seeds, bands their range; a dotted line is an alarm.
    """
    figure = new_figure(1.0 + 3.3 * len(panels), 3.8)
    left = None
    for index, panel in enumerate(panels):
        axes = left = figure.add_subplot(1, len(panels), index + 1, sharey=left)
        for name, errors, color, marker in (
            ("population", panel.population, EMA, "s"),
            ("mini-batch, random", panel.mini_batch, BATCHES, "^"),
            ("mini-batch, same pattern", panel.same_pattern, PRECISE, "o"),
        ):
            runs = np.asarray(errors, dtype=float)
            epochs = np.arange(1, runs.shape[1] + 1)
            if len(runs) > 1:
                axes.fill_between(epochs, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.18, linewidth=0)
            axes.plot(epochs, runs.mean(axis=0), color=color, marker=marker, label=name)
        for number, epoch in enumerate(panel.alarms):
            label = None if number else "alarm"
            axes.axvline(epoch, color="#4D4D4D", linestyle=":", linewidth=1.2, label=label)
        axes.set_title(panel.title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best", fontsize=8)
        if index == 0:
            axes.set_ylabel("validation error (%)")
    return figure


@styled
def leakage_by_layer(icc: Mapping[str, float], noise: Mapping[str, float], *, p_value: float) -> Figure:
    """Correlation of the samples that each layer normalizes together, on the band of what chance gives.

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
