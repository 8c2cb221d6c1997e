"""The paper's Fig. 2: one channel's EMA against the batch statistics it is supposed to summarise."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_bn.plots.style import BATCHES, EMA, PRECISE, new_figure, styled


@styled
def ema_and_cloud(ema: Sequence[float], clouds: Mapping[int, Sequence[float]], *, title: str = "") -> Figure:
    """One channel's EMA mean over training, and at some steps the batch means of the model as it was then.

    A dot is one batch's mean, computed with the weights fixed at that step; their average is the population
    mean. An EMA that describes the model runs through the middle of every cloud.

    Args:
        ema: The running mean after every training step.
        clouds: Step (1 is the first) -> the means of many batches under the fixed model of that step.
        title: Printed above the axes.
    """
    figure = new_figure(6.8, 4.0)
    axes = figure.add_subplot()
    steps = sorted(clouds)
    # Spread the dots sideways, evenly and not at random, so that a cloud shows its density and the picture
    # repeats.
    width = 0.6 * min(np.diff(steps), default=len(ema)) if len(steps) > 1 else 1.0
    for step in steps:
        sideways = width * np.linspace(-0.5, 0.5, len(clouds[step]))
        label = "batch means, weights fixed" if step == steps[0] else None
        axes.plot(step + sideways, clouds[step], "o", color=BATCHES, alpha=0.45, markersize=3, label=label)
    population = [float(np.mean(clouds[step])) for step in steps]
    axes.plot(steps, population, color=PRECISE, linewidth=1, linestyle=":", zorder=2)
    bar = axes.plot(steps, population, "_", color=PRECISE, markersize=13, markeredgewidth=2.2, zorder=4)
    bar[0].set_label("population mean (PreciseBN)")
    axes.plot(np.arange(1, len(ema) + 1), ema, color=EMA, label="EMA (running_mean)", zorder=3)
    axes.set_xlabel("training step")
    axes.set_ylabel("mean of one channel")
    axes.set_title(title)
    axes.margins(x=0.02)
    axes.legend(loc="best", fontsize=9)
    return figure
