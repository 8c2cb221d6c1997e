"""Figures of how far EMA statistics are off, in which layers, and why.

A gap is one number per layer and step: of the mean in sigma, of the variance as a log ratio (0.7 is a factor of two).
Over a window of steps it splits into *lag* (the mean offset: a stale EMA) and *noise* (the spread of batch statistics:
a small normalization batch).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from lightning_bn.plots.lag import Array, checked, draw_lag_against_noise
from lightning_bn.plots.style import EMA, PRECISE, new_figure, plain_log_ticks, short_names, step_axis, styled

MAX_COLUMNS = 400  # a heatmap of a longer run shows this many groups of steps, each by its largest gap

_PANELS = (
    ("mean gap (σ)", ("mean_gap_p50", "mean_gap_p95", "mean_gap_max")),
    ("variance gap (log ratio)", ("var_gap_p95", "var_gap_max")),
    ("worst lag and worst noise (σ)", ("lag_max", "noise_max")),
    ("how many", ("dead_channels", "nonfinite_layers")),
)
_LOOK: Mapping[str, Mapping[str, Any]] = {
    "p50": {"color": EMA, "linewidth": 2.4},
    "p95": {"color": EMA, "linewidth": 1.5, "linestyle": "--"},
    "max": {"color": "#7A3600", "linewidth": 1.0},
    "lag_max": {"color": EMA, "label": "lag"},
    "noise_max": {"color": "#5A5A5A", "linestyle": "--", "label": "noise"},
    "dead_channels": {"color": "#5A5A5A", "label": "dead channels"},
    "nonfinite_layers": {"color": EMA, "linestyle": "--", "label": "non-finite layers"},
}
_ABOVE: Mapping[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}


@styled
def gap_heatmap(
    steps: Sequence[float],
    *,
    layers: Sequence[str],
    gaps: npt.ArrayLike,
    quantity: str = "mean gap (sigma)",
    title: str = "",
) -> Figure:
    """Draws the gap of every layer at every step as a heatmap.

    The color scale is logarithmic and covers at least 0.01 to 1. Layers that were not measured (NaN) are hatched.

    Args:
        steps: Steps of the measurements, increasing.
        layers: Layer names in the model's order; the first is on top.
        gaps: ``(len(steps), len(layers))``; another shape is a ValueError.
        quantity: Label of the color scale.
        title: Printed above the axes.
    """
    figure = new_figure(8.0, float(np.clip(1.5 + 0.16 * len(layers), 2.8, 11.0)))
    axes = figure.add_subplot()
    _draw_heatmap(axes, steps, layers, checked("gaps", gaps, layers, steps), quantity)
    axes.set_title(title)
    return figure


@styled
def drift_overview(
    steps: Sequence[float],
    *,
    layers: Sequence[str],
    mean_gap: npt.ArrayLike,
    var_gap: npt.ArrayLike,
    lag: npt.ArrayLike,
    noise: npt.ArrayLike,
    precise_gap: npt.ArrayLike | None = None,
    dead: npt.ArrayLike | None = None,
    marked: Collection[str] = (),
    title: str = "",
) -> Figure:
    """Draws a run in one figure: mean gap over steps, variance gap by layer, lag against noise, the ten worst layers.

    `mean_gap` (in sigma; NaN: not measured) and `var_gap` (log ratio) are ``(len(steps), len(layers))``. `precise_gap`
    (how far PreciseBN moved each mean, in sigma) and `dead` (channels without variance) have one number per layer. The
    other arguments are as in `lag_against_noise`. An array of another shape is a ValueError.
    """
    mean_gap, var_gap = checked("mean_gap", mean_gap, layers, steps), checked("var_gap", var_gap, layers, steps)
    figure = new_figure(15.0, 10.5, title)
    quarters: Any = figure.subfigures(2, 2, wspace=0.03, hspace=0.04, height_ratios=[1, 1.1])
    over_steps, why, heatmap, worst = (quarter.add_subplot() for quarter in quarters.flat)

    finite = np.where(np.isfinite(mean_gap), mean_gap, np.nan)
    kept = ~np.isnan(finite).all(axis=1)
    for name, percentile in (("p50", 50), ("p95", 95), ("max", 100)):
        _draw_line(over_steps, name, np.asarray(steps)[kept], np.nanpercentile(finite[kept], percentile, axis=1))
    _finish_lines(over_steps, "mean gap (σ)", log=True)
    over_steps.set_title("Mean gap over the layers")
    _draw_heatmap(heatmap, steps, layers, var_gap, "variance gap (log ratio)")
    heatmap.set_title("Variance gap by layer")
    draw_lag_against_noise(why, layers, checked("lag", lag, layers), checked("noise", noise, layers), marked)
    why.set_title("Why: a stale EMA, or a small batch")
    precise = None if precise_gap is None else checked("precise_gap", precise_gap, layers)
    num_dead = np.zeros(len(layers)) if dead is None else checked("dead", dead, layers)
    with np.errstate(invalid="ignore"):
        rms = np.sqrt(np.nansum(mean_gap**2, axis=0) / (~np.isnan(mean_gap)).sum(axis=0))
    _draw_worst(worst, layers, rms, precise, num_dead)
    return figure


@styled
def aggregates_over_steps(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str = "") -> Figure:
    """Draws over steps what `BNStatsMonitor` logs for all layers together (`bn_agg/...`).

    `series` has steps and values by name, such as ``mean_gap_p95``. Unknown names and ``worst_layer`` are ignored.
    """
    panels = [(label, [name for name in names if name in series]) for label, names in _PANELS]
    panels = [(label, names) for label, names in panels if names]
    if not panels:
        known = ", ".join(name for _, names in _PANELS for name in names)
        raise ValueError(f"aggregates_over_steps draws {known}, but series has {', '.join(series) or 'no names'}.")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.6 * columns, 0.4 + 2.8 * rows, title)
    for index, (label, names) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, index)
        for name in names:
            _draw_line(axes, name, *series[name])
        _finish_lines(axes, label, log=label != "how many")
    return figure


def _draw_line(axes: Axes, name: str, steps: Any, values: Any) -> None:
    suffix = name.rsplit("_", 1)[-1]
    look = _LOOK.get(name) or _LOOK[suffix]
    axes.plot(steps, values, **{"label": suffix, "marker": "o" if len(steps) == 1 else None, **look})


def _finish_lines(axes: Axes, label: str, *, log: bool) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if log and (np.isfinite(values) & (values > 0)).any():
        axes.set_yscale("log", nonpositive="mask")
        plain_log_ticks(axes.yaxis, axes.get_ylim())
    elif not (values > 0).any():
        axes.set_ylim(-0.05, 1.0)
    step_axis(axes)
    axes.set_ylabel(label)
    axes.legend(fontsize=9, ncols=len(axes.lines), **_ABOVE)


def _draw_heatmap(axes: Axes, steps: Sequence[float], layers: Sequence[str], gaps: Array, quantity: str) -> None:
    figure: Figure | SubFigure = axes.get_figure(root=False)  # type: ignore[assignment]
    centers, gaps = _grouped(np.asarray(steps, dtype=float), gaps)
    low, high = _color_limits(gaps)
    between = (centers[1:] + centers[:-1]) / 2
    first, last = (between[0] - centers[0], centers[-1] - between[-1]) if len(centers) > 1 else (0.5, 0.5)
    edges = np.concatenate([[centers[0] - first], between, [centers[-1] + last]])
    cells = np.ma.masked_invalid(np.clip(gaps, low, high)).T  # clipped first: infinite is the largest gap, not missing
    rows = np.arange(len(layers) + 1)
    mesh = axes.pcolormesh(edges, rows, cells, cmap="magma_r", norm=LogNorm(low, high), rasterized=True)
    axes.set_ylim(len(layers), 0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    hatched: dict[str, Any] = {"facecolor": "white", "edgecolor": "#A0A0A0", "hatch": "//////", "linewidth": 0}
    axes.patch.set(**hatched)
    if np.isnan(gaps).any():
        axes.legend(handles=[Patch(label="not measured", **hatched)], fontsize=8, **_ABOVE)
    inches = figure.bbox.height / figure.figure.dpi - 1.1
    every = int(np.ceil(len(layers) * 0.135 / max(inches, 1.0)))  # name every n-th layer if not all names fit
    size = 8 if every == 1 and len(layers) <= 40 else 7
    axes.set_yticks(np.arange(0, len(layers), every) + 0.5, short_names(layers)[::every], fontsize=size)
    axes.tick_params(axis="y", length=0)
    step_axis(axes)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05, aspect=max(12.0, 7.5 * inches), label=quantity)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda gap, _: f"{gap:g}"))


def _draw_worst(axes: Axes, layers: Sequence[str], gap: Array, precise: Array | None, dead: Array) -> None:
    ranked = np.argsort(-gap, kind="stable")  # NaN comes last
    worst = [int(index) for index in ranked if not np.isnan(gap[index])][:10]
    axes.set_title("Worst layers over the run" if len(layers) > 10 else "Over the run")
    bars = [(gap[worst], EMA, "EMA to the batches (mean gap)")]
    if precise is not None:
        bars.append((precise[worst], PRECISE, "EMA to PreciseBN"))
    finite = np.concatenate([values[np.isfinite(values)] for values, *_ in bars])
    longest = float(finite.max(initial=0.0)) or 1.0
    thick = 0.8 / len(bars)
    for number, (values, color, label) in enumerate(bars):
        places = np.arange(len(worst)) - 0.4 + thick * (number + 0.5)
        lengths = np.clip(np.nan_to_num(values, nan=0.0, posinf=longest), 0.0, longest)
        axes.barh(places, lengths, height=thick * 0.92, color=color, label=label)
        for place, length, value, count in zip(places, lengths, values, dead[worst], strict=True):
            text = "not measured" if np.isnan(value) else f"{value:.2g}"
            if number == 0 and count > 0:
                text += f"   {count:.0f} dead channel{'s' if count > 1 else ''}"
            axes.text(length + 0.01 * longest, place, text, va="center", fontsize=8 if len(bars) == 1 else 7)
    axes.set_yticks(range(len(worst)), [short_names(layers)[index] for index in worst], fontsize=8)
    axes.set(ylim=(max(len(worst), 3) - 0.5, -0.5), xlim=(0, longest * 1.25), xlabel="mean gap (σ)")
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    if precise is not None:
        axes.legend(fontsize=8, **_ABOVE)


def _color_limits(gaps: Array) -> tuple[float, float]:
    positive = gaps[np.isfinite(gaps) & (gaps > 0)]
    if not len(positive):
        return 0.01, 1.0
    high = max(1.0, 10.0 ** np.ceil(np.log10(positive.max())))
    low = 10.0 ** np.floor(np.log10(np.percentile(positive, 5)))
    return float(np.clip(low, high * 1e-4, 0.01)), float(high)


def _grouped(steps: Array, gaps: Array) -> tuple[Array, Array]:
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MAX_COLUMNS))
    largest = np.stack([np.where(np.isnan(gaps[group]), -np.inf, gaps[group]).max(axis=0) for group in groups])
    return np.array([steps[group].mean() for group in groups]), np.where(np.isneginf(largest), np.nan, largest)
