"""The paper's Fig. 2: the EMA of single channels beside the batch statistics that it summarizes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_bn.plots.style import BATCHES, EMA, PRECISE, new_figure, short_names, step_axis, styled


class ChannelTrace(NamedTuple):
    """The mean of one channel over training."""

    title: str
    """Name of the channel."""
    steps: Sequence[float]
    """Steps at which the EMA was read."""
    ema: Sequence[float]
    """The running mean at each of `steps`."""
    batches: Mapping[int, Sequence[float]] = {}
    """Step -> means of batches: of one training batch, or of many with the weights of that step."""
    precise: Mapping[int, float] = {}
    """Step -> population mean from PreciseBN."""


@styled
def channels_over_steps(traces: Sequence[ChannelTrace], *, title: str = "") -> Figure:
    """Draws the running mean of channels over training, one panel each, with a dot for each batch mean.

    An accurate EMA runs through the middle of the dots. An EMA outside of the dots is stale. Dots that scatter more
    than the EMA is off mean a small normalization batch.
    """
    if not traces:
        raise ValueError("channels_over_steps needs at least one ChannelTrace, but traces is empty.")
    columns = 1 if len(traces) == 1 else 2 if len(traces) <= 6 else 3
    rows = -(-len(traces) // columns)
    figure = new_figure(*(6.8, 4.0) if columns == 1 else (4.8 * columns, 0.5 + 2.7 * rows), title)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    names = short_names([trace.title for trace in traces], max_length=64 if columns == 1 else 48)
    for index, (axes, trace, name) in enumerate(zip(panels, traces, names, strict=False)):
        _draw_channel(axes, trace)
        axes.set_title(name, fontsize=11 if columns == 1 else 9)
        axes.set_xlabel("training step" if index >= len(traces) - columns else "")
        axes.set_ylabel("mean of one channel" if index % columns == 0 else "")
    for axes in panels[len(traces) :]:
        axes.set_visible(False)
    if columns == 1:
        panels[0].legend(loc="best", fontsize=9)
    else:
        found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
        handles = {label: handle for pairs in found for handle, label in pairs}
        figure.legend(handles.values(), handles, loc="outside upper right", ncols=len(handles), fontsize=9)
    return figure


def _draw_channel(axes: Axes, trace: ChannelTrace) -> None:
    clouds = {step: trace.batches[step] for step in sorted(trace.batches) if len(trace.batches[step])}
    if clouds:
        # Spread the dots of a step sideways to show their density: evenly, so that the picture is reproducible.
        width = 0.6 * min(np.diff(list(clouds)), default=1.0)
        x = [step + width * (len(c) > 1) * np.linspace(-0.5, 0.5, len(c)) for step, c in clouds.items()]
        means = np.concatenate([np.asarray(cloud, dtype=float) for cloud in clouds.values()])
        label = "batch means, weights fixed" if len(means) > len(clouds) else "batch means"
        alpha, edge = (0.45, 1.0) if len(means) <= 400 else (0.25, 0.0)
        axes.plot(
            np.concatenate(x), means, "o", color=BATCHES, alpha=alpha, markersize=3, markeredgewidth=edge, label=label
        )
    if trace.precise:
        steps = sorted(trace.precise)
        population = [trace.precise[step] for step in steps]
        axes.plot(steps, population, color=PRECISE, linewidth=1, linestyle=":", zorder=2)
        size = 13 if len(steps) <= 15 else 7
        label = "population mean (PreciseBN)"
        axes.plot(steps, population, "_", color=PRECISE, markersize=size, markeredgewidth=2.2, zorder=4, label=label)
    marker = "o" if len(trace.steps) == 1 else None
    axes.plot(trace.steps, trace.ema, color=EMA, marker=marker, label="EMA (running_mean)", zorder=3)
    axes.margins(x=0.02)
    step_axis(axes)
