"""Where a network's EMA statistics are off, how far, and why: the pictures of `BNStatsMonitor`.

A gap is one number a layer and a step: the mean's in sigma, the variance's as a log ratio (0.7 is a factor of two).
Over a window of steps it splits into *lag*, the offset that stays when batches are averaged (a stale EMA), and
*noise*, the spread of the batches themselves (a small normalization batch).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lightning_bn.plots.style import BATCHES, EMA, PRECISE, new_figure, short_names, step_axis, styled

Array = npt.NDArray[np.float64]

MAX_COLUMNS = 400
"""A heatmap of a longer run shows this many spans of steps, each with its largest gap."""

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
    "nonfinite_layers": {"color": EMA, "linestyle": "--", "label": "layers that are not finite"},
}


@styled
def gap_heatmap(
    steps: Sequence[float],
    layers: Sequence[str],
    gaps: npt.ArrayLike,
    *,
    quantity: str = "mean gap (sigma)",
    title: str = "",
) -> Figure:
    """Every layer's gap at every step, as colors: which part of the network is off, and when.

    The color scale is logarithmic and covers at least 0.01 to 1, so that a color means the same in most pictures.
    Layers that were not measured (NaN) are hatched. With more layers than names fit, every second or third is named.

    Args:
        steps: When it was measured, rising.
        layers: The layers' names in the model's order; the input is on top.
        gaps: One row a step, one column a layer: ``(len(steps), len(layers))``.
        quantity: What the colors stand for.
        title: Printed above the axes.

    Raises:
        ValueError: `gaps` has another shape, or nothing in it.
    """
    figure = new_figure(8.0, float(np.clip(1.5 + 0.16 * len(layers), 2.8, 11.0)))
    axes = figure.add_subplot()
    _draw_heatmap(figure, axes, steps, layers, _table("gaps", gaps, steps, layers), quantity)
    axes.set_title(title)
    return figure


@styled
def lag_against_noise(
    layers: Sequence[str],
    lag: npt.ArrayLike,
    noise: npt.ArrayLike,
    *,
    marked: Collection[str] = (),
    title: str = "",
) -> Figure:
    """Every layer's lag against its noise: whether the EMA is stale or the normalization batch small.

    Above the diagonal a layer's EMA is further off than its batches scatter: PreciseBN, or a larger momentum, helps.
    Below it, batches scatter more than the EMA is off: only a larger normalization batch helps. The worst layers
    are named.

    Args:
        layers: The layers' names.
        lag: Mean offset of the window's batches from the EMA, in sigma; ``(len(layers),)``. NaN: not measured.
        noise: Spread of the window's batch means, in sigma; ``(len(layers),)``.
        marked: Names of layers that were measured directly or are frozen; drawn as diamonds.
        title: Printed above the axes.

    Raises:
        ValueError: `lag` or `noise` has another shape.
    """
    figure = new_figure(8.6, 5.4)
    axes = figure.add_subplot()
    _draw_lag_against_noise(axes, layers, _row("lag", lag, layers), _row("noise", noise, layers), marked, named=6)
    axes.set_box_aspect(1)
    axes.set_anchor("W")
    axes.set_title(title)
    return figure


@styled
def drift_overview(
    steps: Sequence[float],
    layers: Sequence[str],
    mean_gap: npt.ArrayLike,
    var_gap: npt.ArrayLike,
    lag: npt.ArrayLike,
    noise: npt.ArrayLike,
    *,
    precise_gap: npt.ArrayLike | None = None,
    dead: npt.ArrayLike | None = None,
    marked: Collection[str] = (),
    title: str = "",
) -> Figure:
    """A whole run in one picture: the mean gap over steps, the variance gap by layer, the reason, the ten worst layers.

    Args:
        steps: When it was measured, rising.
        layers: The layers' names in the model's order.
        mean_gap: ``(len(steps), len(layers))``, in sigma. NaN: not measured.
        var_gap: ``(len(steps), len(layers))``, log ratio.
        lag: ``(len(layers),)``, as in `lag_against_noise`.
        noise: ``(len(layers),)``, as in `lag_against_noise`.
        precise_gap: ``(len(layers),)``, in sigma: how far PreciseBN moved each layer's mean.
        dead: ``(len(layers),)``, how many channels of each layer have no variance.
        marked: As in `lag_against_noise`.
        title: Printed above all panels.

    Raises:
        ValueError: An array has another shape, or there is nothing in it.
    """
    mean_gap, var_gap = _table("mean_gap", mean_gap, steps, layers), _table("var_gap", var_gap, steps, layers)
    lag, noise = _row("lag", lag, layers), _row("noise", noise, layers)
    figure = new_figure(15.0, 10.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    quarters: Any = figure.subfigures(2, 2, wspace=0.03, hspace=0.04, height_ratios=[1, 1.1])
    over, why, heat, worst = (quarter.add_subplot() for quarter in quarters.flat)

    finite = np.where(np.isfinite(mean_gap), mean_gap, np.nan)
    kept = ~np.isnan(finite).all(axis=1)
    for name, share in (("p50", 50), ("p95", 95), ("max", 100)):
        _draw_line(over, name, np.asarray(steps)[kept], np.nanpercentile(finite[kept], share, axis=1))
    _finish_lines(over, "mean gap (σ)", log=True)
    over.set_title("Mean gap over the layers")

    _draw_heatmap(quarters[1, 0], heat, steps, layers, var_gap, "variance gap (log ratio)")
    heat.set_title("Variance gap by layer")
    _draw_lag_against_noise(why, layers, lag, noise, marked, named=5)
    why.set_title("Why: a stale EMA, or a small batch")
    _draw_worst(
        worst,
        layers,
        _rms_over_rows(mean_gap),
        None if precise_gap is None else _row("precise_gap", precise_gap, layers),
        None if dead is None else _row("dead", dead, layers),
    )
    return figure


@styled
def aggregates_over_steps(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str = "") -> Figure:
    """The figures that `BNStatsMonitor` logs of all layers together (`bn_agg/...`), over the steps.

    Args:
        series: Name, such as ``mean_gap_p95``, -> steps and values. Names that are no figure of the monitor, and
            ``worst_layer``, whose values are names and no amounts, are left out.
        title: Printed above all panels.

    Raises:
        ValueError: None of the names is known.
    """
    panels = [(label, [name for name in names if name in series]) for label, names in _PANELS]
    panels = [(label, names) for label, names in panels if names]
    if not panels:
        known = ", ".join(name for _, names in _PANELS for name in names)
        raise ValueError(f"aggregates_over_steps draws {known}; it was given {', '.join(series) or 'nothing'}.")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.6 * columns, 0.4 + 2.8 * rows)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    for index, (label, names) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name in names:
            _draw_line(axes, name, *series[name])
        _finish_lines(axes, label, log=label != "how many")
    return figure


def _draw_line(axes: Axes, name: str, steps: npt.ArrayLike, values: npt.ArrayLike) -> None:
    steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    look = _LOOK.get(name) or _LOOK[name.rsplit("_", 1)[-1]]
    label = look.get("label", name.rsplit("_", 1)[-1])
    axes.plot(steps, values, **{**look, "label": label, "marker": "o" if len(steps) == 1 else None})


def _finish_lines(axes: Axes, label: str, *, log: bool) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if log and (np.isfinite(values) & (values > 0)).any():
        axes.set_yscale("log", nonpositive="mask")
        _plain_log_ticks(axes, "y")
    elif not (values > 0).any():
        axes.set_ylim(-0.05, 1.0)
    step_axis(axes)
    axes.set_ylabel(label)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=9, ncols=len(axes.lines), borderaxespad=0.1)


def _draw_heatmap(
    figure: Figure | SubFigure, axes: Axes, steps: Sequence[float], layers: Sequence[str], gaps: Array, quantity: str
) -> QuadMesh:
    centres, gaps = _spans(np.asarray(steps, dtype=float), gaps)
    low, high = _color_limits(gaps)
    between = (centres[1:] + centres[:-1]) / 2
    first, last = (between[0] - centres[0], centres[-1] - between[-1]) if len(centres) > 1 else (0.5, 0.5)
    edges = np.concatenate([[centres[0] - first], between, [centres[-1] + last]])
    cells = np.ma.masked_invalid(np.clip(gaps, low, high)).T  # clipped first: infinite is the largest, not missing
    mesh = axes.pcolormesh(
        edges, np.arange(len(layers) + 1), cells, cmap="magma_r", norm=LogNorm(low, high), rasterized=True
    )
    axes.set_ylim(len(layers), 0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.patch.set(facecolor="white", edgecolor="#A0A0A0", hatch="//////", linewidth=0)
    if np.isnan(gaps).any():
        missing = Patch(facecolor="white", edgecolor="#A0A0A0", hatch="//////", linewidth=0, label="not measured")
        axes.legend(handles=[missing], loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, borderaxespad=0.1)
    inches = figure.bbox.height / figure.figure.dpi - 1.1
    every = int(np.ceil(len(layers) * 0.135 / max(inches, 1.0)))
    size = 8 if every == 1 and len(layers) <= 40 else 7
    shown = np.arange(0, len(layers), every)
    axes.set_yticks(shown + 0.5, short_names(layers)[::every], fontsize=size)
    axes.tick_params(axis="y", length=0)
    step_axis(axes)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05, aspect=max(12.0, 7.5 * inches), label=quantity)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda gap, _: f"{gap:g}"))
    return mesh


def _draw_lag_against_noise(
    axes: Axes, layers: Sequence[str], lag: Array, noise: Array, marked: Collection[str], *, named: int
) -> None:
    known = np.isfinite(lag) & np.isfinite(noise)
    positive = np.concatenate([values[known & (values > 0)] for values in (lag, noise)])
    high = float(positive.max()) if len(positive) else 1.0
    low = max(float(positive.min()) if len(positive) else 1e-3, high * 1e-4)
    low, high = low / 1.6, high * 1.6
    x, y = np.clip(noise, low * 1.1, None), np.clip(lag, low * 1.1, None)

    ends = np.array([low, high])
    axes.fill_between(ends, ends, high, color=EMA, alpha=0.07, linewidth=0)
    axes.fill_between(ends, low, ends, color=BATCHES, alpha=0.12, linewidth=0)
    axes.plot(ends, ends, color="#4D4D4D", linewidth=1, linestyle=":")
    text: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 9, "fontweight": "bold", "zorder": 6}
    axes.text(0.02, 0.975, "stale EMA", color=EMA, va="top", **text)
    behind = {"facecolor": "#F0F0F0", "edgecolor": "none", "pad": 1}
    axes.text(0.98, 0.025, "small normalization batch", color="#4D4D4D", ha="right", bbox=behind, **text)
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
        handles.append(
            Line2D([], [], linestyle="none", label=f"{(~known).sum()} of {len(layers)} layers without a finite value")
        )
    if handles:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8, ncols=2)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in ("x", "y"):
        _plain_log_ticks(axes, axis)
    axes.set_xlabel("noise: spread of the batch means (σ)")
    axes.set_ylabel("lag: mean offset from the EMA (σ)")

    size_of = np.where(known, np.maximum(lag, noise), 0.0)
    worst = [int(index) for index in np.argsort(-size_of)[:named] if size_of[index] > 0]
    short = short_names(layers)
    _name_points(axes, x[worst], y[worst], [short[index] for index in worst])


def _name_points(axes: Axes, x: Array, y: Array, names: Sequence[str]) -> None:
    """Names in a column right of the axes, each joined to its point: however close the points, names stay apart."""
    low, high = np.log(axes.get_ylim())
    heights = (np.log(y) - low) / (high - low)
    order = np.argsort(-heights)
    apart, top = 0.075, 1.0
    places = np.empty(len(order))
    for index in order:
        places[index] = top = min(float(heights[index]), top - apart)
    places += max(0.0, apart / 2 - min(places, default=1.0))
    for index in order:
        axes.annotate(
            names[index],
            (x[index], y[index]),
            (1.05, places[index]),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "#8C8C8C",
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _draw_worst(axes: Axes, layers: Sequence[str], gap: Array, precise: Array | None, dead: Array | None) -> None:
    ranked = np.argsort(-np.nan_to_num(gap, nan=-1.0, posinf=np.inf), kind="stable")
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
        for row, (place, length, value) in enumerate(zip(places, lengths, values, strict=True)):
            text = "not measured" if np.isnan(value) else f"{value:.2g}"
            if number == 0 and dead is not None and dead[worst[row]] > 0:
                text += f"   {dead[worst[row]]:.0f} dead channel{'s' if dead[worst[row]] > 1 else ''}"
            axes.text(length + 0.01 * longest, place, text, va="center", fontsize=8 if len(bars) == 1 else 7)
    axes.set_yticks(range(len(worst)), [short_names(layers)[index] for index in worst], fontsize=8)
    axes.set_ylim(max(len(worst), 3) - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.25)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("mean gap (σ)")
    if precise is not None:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, borderaxespad=0.1)


def _plain_log_ticks(axes: Axes, axis: str) -> None:
    """0.01, 0.1, 1, 10 instead of powers; where less than two decades show, also their halves and fifths."""
    low, high = axes.get_ylim() if axis == "y" else axes.get_xlim()
    ticks = axes.yaxis if axis == "y" else axes.xaxis
    ticks.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0), numticks=12))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def _color_limits(gaps: Array) -> tuple[float, float]:
    positive = gaps[np.isfinite(gaps) & (gaps > 0)]
    if not len(positive):
        return 0.01, 1.0
    high = max(1.0, 10.0 ** np.ceil(np.log10(positive.max())))
    low = 10.0 ** np.floor(np.log10(np.percentile(positive, 5)))
    return float(np.clip(low, high * 1e-4, 0.01)), float(high)


def _spans(steps: Array, gaps: Array) -> tuple[Array, Array]:
    if len(steps) <= MAX_COLUMNS:
        return steps, gaps
    spans = np.array_split(np.arange(len(steps)), MAX_COLUMNS)
    largest = np.stack([np.where(np.isnan(gaps[span]), -np.inf, gaps[span]).max(axis=0) for span in spans])
    return np.array([steps[span].mean() for span in spans]), np.where(np.isneginf(largest), np.nan, largest)


def _rms_over_rows(gaps: npt.ArrayLike) -> Array:
    """Every layer's root mean square over the rows in which it was measured; NaN where there is none."""
    gaps = np.asarray(gaps, dtype=np.float64)
    measured = ~np.isnan(gaps)
    with np.errstate(invalid="ignore"):
        squares: Array = np.where(measured, gaps, 0.0) ** 2
        return np.asarray(np.sqrt(squares.sum(axis=0) / measured.sum(axis=0)), dtype=np.float64)


def _table(name: str, gaps: npt.ArrayLike, steps: Sequence[float], layers: Sequence[str]) -> Array:
    table = np.asarray(gaps, dtype=np.float64)
    if table.shape != (len(steps), len(layers)) or not table.size:
        raise ValueError(
            f"{name} must hold one row a step and one column a layer, at least one of each: for {len(steps)} steps and "
            f"{len(layers)} layers its shape must be {(len(steps), len(layers))}, and is {table.shape}."
        )
    return table


def _row(name: str, values: npt.ArrayLike, layers: Sequence[str]) -> Array:
    row = np.asarray(values, dtype=np.float64)
    if row.shape != (len(layers),):
        raise ValueError(f"{name} must hold one number for each of {len(layers)} layers; its shape is {row.shape}.")
    return row
