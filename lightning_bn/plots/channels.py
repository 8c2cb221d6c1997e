"""The paper's Fig. 2: a channel's EMA against the batch statistics it is supposed to summarize."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_bn.plots.style import BATCHES, EMA, PRECISE, legend_above, new_figure, short_names, step_axis, styled


class ChannelTrace(NamedTuple):
    """What is known of one channel's mean over training."""

    title: str
    """Which channel it is."""
    steps: Sequence[float]
    """When the EMA was read."""
    ema: Sequence[float]
    """The running mean at each of `steps`."""
    batches: Mapping[int, Sequence[float]] = {}
    """Step -> the means of the batches measured there: one batch of a running training, or many under fixed weights."""
    precise: Mapping[int, float] = {}
    """Step -> the population mean that PreciseBN found there."""


@styled
def channels_over_steps(traces: Sequence[ChannelTrace], *, title: str = "") -> Figure:
    """The running mean of chosen channels over training, one panel a channel, in the cloud of the batch means.

    A dot is one batch's mean. An EMA that describes the model runs through the middle of the cloud: beside it
    the EMA is stale, and a cloud that is wide against its distance to the EMA comes of small normalization batches.

    Args:
        traces: The channels, one panel each.
        title: Printed above all panels.

    Raises:
        ValueError: There is no channel to draw.
    """
    if not traces:
        raise ValueError("channels_over_steps needs at least one ChannelTrace, and was given none.")
    columns = 1 if len(traces) == 1 else 2 if len(traces) <= 6 else 3
    rows = -(-len(traces) // columns)
    width, height = (6.8, 4.0) if columns == 1 else (4.8 * columns, 0.5 + 2.7 * rows)
    figure = new_figure(width, height)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, trace, name in zip(
        panels, traces, short_names([t.title for t in traces], longest=64 if columns == 1 else 48), strict=False
    ):
        _draw_channel(axes, trace)
        axes.set_title(name, fontsize=11 if columns == 1 else 9)
    for index, axes in enumerate(panels):
        axes.set_visible(index < len(traces))
        if index < len(traces) - columns:
            axes.set_xlabel("")
        if index % columns == 0:
            axes.set_ylabel("mean of one channel")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if columns == 1:
        panels[0].legend(loc="best", fontsize=9)
        figure.suptitle(title)
    else:
        legend_above(figure, handles, title)
    return figure


def _draw_channel(axes: Axes, trace: ChannelTrace) -> None:
    clouds = {step: trace.batches[step] for step in sorted(trace.batches) if len(trace.batches[step])}
    if clouds:
        # Spread the dots of one step sideways, evenly and not at random, so that a cloud shows its density and
        # the picture repeats.
        width = 0.6 * min(np.diff(list(clouds)), default=1.0)
        sideways = [
            step + width * (np.linspace(-0.5, 0.5, len(c)) if len(c) > 1 else 0.0) for step, c in clouds.items()
        ]
        dots = np.concatenate([np.broadcast_to(x, len(c)) for x, c in zip(sideways, clouds.values(), strict=True)])
        means = np.concatenate([np.asarray(cloud, dtype=float) for cloud in clouds.values()])
        label = "batch means, weights fixed" if len(means) > len(clouds) else "batch means"
        alpha, edge = (0.45, 1.0) if len(means) <= 400 else (0.25, 0.0)
        axes.plot(dots, means, "o", color=BATCHES, alpha=alpha, markersize=3, markeredgewidth=edge, label=label)
    if trace.precise:
        steps = sorted(trace.precise)
        population = [trace.precise[step] for step in steps]
        axes.plot(steps, population, color=PRECISE, linewidth=1, linestyle=":", zorder=2)
        size = 13 if len(steps) <= 15 else 7
        label = "population mean (PreciseBN)"
        axes.plot(steps, population, "_", color=PRECISE, markersize=size, markeredgewidth=2.2, zorder=4, label=label)
    single = "o" if len(trace.steps) == 1 else None
    axes.plot(trace.steps, trace.ema, color=EMA, marker=single, label="EMA (running_mean)", zorder=3)
    axes.margins(x=0.02)
    step_axis(axes)
