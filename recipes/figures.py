"""The figures of recipes, in the style of `lightning_bn.plots`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lightning_bn.plots.style import BATCHES, DARK, EMA, PRECISE, new_figure, styled

MIN_ERROR = 0.1  # %; smaller errors are drawn here, because the axis is logarithmic
MIN_GAP = 1e-6  # smaller gaps are rounding errors, and are left out


class SampleSweep(NamedTuple):
    """A panel of `error_against_samples`: errors (%) of one model with EMA and with PreciseBN statistics."""

    title: str
    ema_error: float
    errors: Mapping[int, Sequence[float]]  # N or B -> one error per draw


class DepthProfile(NamedTuple):
    """A column of `gaps_in_depth`: (mean gap, variance gap) of each layer, by the source of the statistics."""

    title: str
    gaps: Mapping[str, Sequence[tuple[float, float]]]
    ema_gaps: Sequence[tuple[float, float]]


class LeakageCurves(NamedTuple):
    """A panel of `leakage_curves`: errors (%), one list per seed with one error per epoch."""

    title: str
    population: Sequence[Sequence[float]]
    mini_batch: Sequence[Sequence[float]]
    same_pattern: Sequence[Sequence[float]]
    alarms: Sequence[int] = ()  # epochs


@styled
def error_curves(
    epochs: Sequence[float], ema: Sequence[Sequence[float]], precise: Sequence[Sequence[float]], *, title: str = ""
) -> Figure:
    """Draws validation error (%) over epochs with EMA and with PreciseBN; one list of errors per seed (Fig. 3, 4)."""
    figure = new_figure(6.8, 4.0)
    axes = figure.add_subplot()
    for errors, color, marker, name in ((ema, EMA, "s", "EMA"), (precise, PRECISE, "o", "PreciseBN")):
        runs = np.maximum(np.asarray(errors, dtype=float), MIN_ERROR)
        _mean_and_range(axes, epochs, runs, color, marker, name)
    _error_axis(axes, np.concatenate([np.ravel(ema), np.ravel(precise)]))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.legend(loc="upper right")
    return figure


@styled
def error_against_samples(sweeps: Sequence[SampleSweep], *, xlabel: str) -> Figure:
    """Draws validation error (%) against N or B: the mean over draws as a line, each draw as a dot (Tables 1, 2)."""
    figure = new_figure(1.0 + 3.4 * len(sweeps), 3.7)
    for index, sweep in enumerate(sweeps):
        axes = figure.add_subplot(1, len(sweeps), index + 1)
        sizes = sorted(sweep.errors)
        axes.axhline(max(sweep.ema_error, MIN_ERROR), color=EMA, linestyle="--", label="EMA")
        means = [max(float(np.mean(sweep.errors[n])), MIN_ERROR) for n in sizes]
        axes.plot(sizes, means, color=PRECISE, marker="o", label="PreciseBN, mean of draws", zorder=3)
        for n in sizes:
            draws = [max(error, MIN_ERROR) for error in sweep.errors[n]]
            label = "one draw" if n == sizes[0] else None
            axes.plot([n] * len(draws), draws, "o", color=PRECISE, alpha=0.35, markersize=4, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}" if n < 1e3 else f"{n / 1e3:g}k"))
        _error_axis(axes, np.asarray([sweep.ema_error, *(e for draws in sweep.errors.values() for e in draws)]))
        axes.set_xlabel(xlabel)
        axes.set_title(sweep.title)
        if index:
            axes.set_ylabel("")
        else:
            axes.legend(loc="best", fontsize=9)
    return figure


@styled
def gaps_in_depth(profiles: Sequence[DepthProfile]) -> Figure:
    """Draws mean gap (top) and variance gap (bottom) over the depth of the network, one column per model."""
    figure = new_figure(1.4 + 3.4 * len(profiles), 5.4)
    panels = figure.subplots(2, len(profiles), sharex="col", sharey="row", squeeze=False)
    for column, profile in enumerate(profiles):
        shades = list(matplotlib.colormaps["Blues"](np.linspace(0.95, 0.4, len(profile.gaps))))
        sources = {**profile.gaps, "EMA": profile.ema_gaps}
        for (name, gaps), color in zip(sources.items(), [*shades, EMA], strict=True):
            for axes, by_layer in zip(panels[:, column], np.asarray(gaps, dtype=float).T, strict=True):
                shown = np.where(by_layer > MIN_GAP, by_layer, np.nan)
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


@styled
def leakage_curves(panels: Sequence[LeakageCurves]) -> Figure:
    """Draws validation error with three kinds of statistics over epochs (Fig. 8); a dotted line is an alarm."""
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
            _mean_and_range(axes, range(1, runs.shape[1] + 1), runs, color, marker, name)
        for number, epoch in enumerate(panel.alarms):
            axes.axvline(epoch, color=DARK, linestyle=":", linewidth=1.2, label=None if number else "alarm")
        axes.set_title(panel.title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best", fontsize=8)
        if index == 0:
            axes.set_ylabel("validation error (%)")
    return figure


@styled
def ap_by_row(rows: Mapping[str, tuple[Sequence[float], float]]) -> Figure:
    """Draws the box AP (%) of each table row, by seed and on average, and the paper's; row -> (AP by seed, paper's)."""
    figure = new_figure(8.0, 1.2 + 0.34 * len(rows))
    here, paper = figure.subplots(1, 2, sharey=True)
    for y, (aps, of_paper) in enumerate(rows.values()):
        here.plot(aps, [y] * len(aps), "o", color=PRECISE, alpha=0.5)
        if len(aps) > 1:
            here.plot(np.mean(aps), y, "|", color=PRECISE, markersize=14)
        paper.plot(of_paper, y, "s", color=BATCHES)
    here.set_yticks(range(len(rows)), list(rows))
    here.invert_yaxis()
    here.set_title("here")
    paper.set_title("paper")
    for axes in (here, paper):
        axes.set_xlim(left=0)
        axes.set_xlabel("box AP (%)")
    return figure


def _mean_and_range(
    axes: Axes, x: Sequence[float], runs: npt.NDArray[np.float64], color: str, marker: str, label: str
) -> None:
    if len(runs) > 1:
        axes.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.18, linewidth=0)
    axes.plot(x, runs.mean(axis=0), color=color, marker=marker, label=label, clip_on=False, zorder=3)


def _error_axis(axes: Axes, errors: npt.NDArray[np.float64]) -> None:
    # Logarithmic, because at the end of training a tenth of a point matters as much as ten points at first.
    lowest, highest = float(max(errors.min(), MIN_ERROR)), float(errors.max())
    axes.set_yscale("log")
    bottom, top = lowest * 0.85, min(highest * 1.18, 115.0)
    axes.set_ylim(bottom, top)
    mantissas = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if highest < 5 * lowest else (1, 1.5, 2, 3, 5, 7)
    ticks = [mantissa * 10.0**power for power in (-1, 0, 1, 2) for mantissa in mantissas]
    if sum(bottom <= tick <= min(top, 100.0) for tick in ticks) < 3:  # a narrow range
        ticks = list(MaxNLocator(4).tick_values(bottom, top))
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if bottom <= tick <= min(top, 100.0)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    axes.set_ylabel("validation error (%)")
