"""Why statistics are off: lag (a stale EMA) against noise (a small normalization batch), by layer."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_bn.plots.style import BATCHES, DARK, EMA, new_figure, plain_log_ticks, short_names, styled

Array = npt.NDArray[np.float64]


@styled
def lag_against_noise(
    layers: Sequence[str],
    *,
    lag: npt.ArrayLike,
    noise: npt.ArrayLike,
    marked: Collection[str] = (),
    title: str = "",
) -> Figure:
    """Draws lag against noise for every layer, and names the worst layers.

    Above the diagonal the EMA is stale: PreciseBN or a larger momentum helps. Below it the normalization batch is
    small: only a larger one helps.

    Args:
        layers: Layer names.
        lag: Mean offset of the batches from the EMA, in sigma; ``(len(layers),)``. NaN: not measured.
        noise: Spread of the batch means, in sigma; ``(len(layers),)``.
        marked: Layers that were measured directly or are frozen; drawn as diamonds.
        title: Printed above the axes.
    """
    figure = new_figure(8.6, 5.4)
    axes = figure.add_subplot()
    draw_lag_against_noise(axes, layers, checked("lag", lag, layers), checked("noise", noise, layers), marked)
    axes.set(box_aspect=1, anchor="W", title=title)
    return figure


def draw_lag_against_noise(
    axes: Axes, layers: Sequence[str], lag: Array, noise: Array, marked: Collection[str]
) -> None:
    """Draws the layers, the diagonal and the names of the six worst layers into `axes`."""
    known = np.isfinite(lag) & np.isfinite(noise)
    positive = np.concatenate([values[known & (values > 0)] for values in (lag, noise)])
    high = float(positive.max(initial=0.0)) or 1.0
    low = max(float(positive.min(initial=high)), high * 1e-4)
    low, high = low / 1.6, high * 1.6
    x, y = np.clip(noise, low * 1.1, None), np.clip(lag, low * 1.1, None)

    _draw_regions(axes, np.array([low, high]))
    special = np.asarray([name in marked for name in layers], dtype=bool)
    color = np.where(y > x, EMA, "#5A5A5A")
    size = 34 if len(layers) <= 60 else 18
    for shape, chosen in (("o", known & ~special), ("D", known & special)):
        axes.scatter(x[chosen], y[chosen], s=size, c=color[chosen], marker=shape, alpha=0.75, edgecolor="white", lw=0.6)
    handles = []
    if (known & special).any():
        look: dict[str, Any] = {"marker": "D", "linestyle": "none", "color": "#5A5A5A", "markersize": 5}
        handles.append(Line2D([], [], label="measured directly or frozen", **look))
    if not known.all():
        text = f"{(~known).sum()} of {len(layers)} layers without a finite value"
        handles.append(Line2D([], [], linestyle="none", label=text))
    if handles:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8, ncols=2)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="noise: spread of the batch means (σ)", ylabel="lag: mean offset from the EMA (σ)")
    for axis in (axes.xaxis, axes.yaxis):
        plain_log_ticks(axis, (low, high))
    largest = np.where(known, np.maximum(lag, noise), 0.0)
    worst = [int(index) for index in np.argsort(-largest)[:6] if largest[index] > 0]
    short = short_names(layers)
    _name_points(axes, x[worst], y[worst], [short[index] for index in worst])


def _draw_regions(axes: Axes, ends: Array) -> None:
    axes.fill_between(ends, ends, ends[1], color=EMA, alpha=0.07, linewidth=0)
    axes.fill_between(ends, ends[0], ends, color=BATCHES, alpha=0.12, linewidth=0)
    axes.plot(ends, ends, color=DARK, linewidth=1, linestyle=":")
    text: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 9, "fontweight": "bold", "zorder": 6}
    axes.text(0.02, 0.975, "stale EMA", color=EMA, va="top", **text)
    behind = {"facecolor": "#F0F0F0", "edgecolor": "none", "pad": 1}
    axes.text(0.98, 0.025, "small normalization batch", color=DARK, ha="right", bbox=behind, **text)


def _name_points(axes: Axes, x: Array, y: Array, names: Sequence[str]) -> None:
    # Names stand in a column right of the axes, joined to their points by lines, so that they never overlap.
    low, high = np.log(axes.get_ylim())
    heights = (np.log(y) - low) / (high - low)
    order = np.argsort(-heights)
    spacing, top = 0.075, 1.0
    places = np.empty(len(order))
    for index in order:
        places[index] = top = min(float(heights[index]), top - spacing)
    places += max(0.0, spacing / 2 - min(places, default=1.0))
    line = {"arrowstyle": "-", "color": BATCHES, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    style: dict[str, Any] = {"textcoords": "axes fraction", "fontsize": 8, "va": "center", "annotation_clip": False}
    for index in order:
        axes.annotate(names[index], (x[index], y[index]), (1.05, places[index]), arrowprops=line, **style)


def checked(name: str, values: npt.ArrayLike, layers: Sequence[str], steps: Sequence[float] | None = None) -> Array:
    """Converts one number per layer, or one per step and layer, to an array, and checks its shape."""
    array = np.asarray(values, dtype=np.float64)
    shape: tuple[int, ...] = (len(layers),)
    needs = f"one number for each of {len(layers)} layers"
    if steps is not None:
        shape = (len(steps), len(layers))
        needs = f"one row per step and one column per layer, {shape}"
    if array.shape != shape or (steps is not None and not array.size):
        raise ValueError(f"{name} needs {needs}; its shape is {array.shape}.")
    return array
