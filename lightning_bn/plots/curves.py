"""Validation error over the epochs (the paper's Fig. 3 and 4), and against what a pass was given (Table 1 and 2)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lightning_bn.plots.style import EMA, PRECISE, new_figure, styled

LOWEST = 0.1  # %; the axes are logarithmic, so smaller errors are drawn here


class SampleSweep(NamedTuple):
    """A row of Table 1 (or 2): one model's error with the EMA's statistics, and with PreciseBN's over N samples."""

    title: str
    ema_error: float
    errors: Mapping[int, Sequence[float]]  # N (or B) -> one error a draw of the samples


@styled
def error_curves(
    epochs: Sequence[float],
    ema: Sequence[Sequence[float]],
    precise: Sequence[Sequence[float]],
    *,
    title: str = "",
) -> Figure:
    """Validation error (%) of the same weights with EMA and with PreciseBN statistics, over the epochs.

    Args:
        epochs: When it was validated, in epochs.
        ema: One list of errors a seed, one error a validation. With several seeds the band spans their range.
        precise: The same with PreciseBN.
        title: Printed above the axes.
    """
    figure = new_figure(6.8, 4.0)
    axes = figure.add_subplot()
    for errors, color, marker, name in ((ema, EMA, "s", "EMA"), (precise, PRECISE, "o", "PreciseBN")):
        runs = np.maximum(np.asarray(errors, dtype=float), LOWEST)
        if len(runs) > 1:
            axes.fill_between(epochs, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.18, linewidth=0)
        axes.plot(epochs, runs.mean(axis=0), color=color, marker=marker, label=name, clip_on=False, zorder=3)
    _error_axis(axes, np.concatenate([np.ravel(ema), np.ravel(precise)]))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.legend(loc="upper right")
    return figure


@styled
def error_against_samples(
    sweeps: Sequence[SampleSweep], *, xlabel: str = "training images N used for the statistics"
) -> Figure:
    """Validation error (%) against the samples that PreciseBN saw, beside the EMA's; one panel a checkpoint.

    The line joins the means over draws; every draw is a dot, so the spread is what one sees.
    """
    figure = new_figure(1.0 + 3.4 * len(sweeps), 3.7)
    for index, sweep in enumerate(sweeps):
        axes = figure.add_subplot(1, len(sweeps), index + 1)
        sizes = sorted(sweep.errors)
        axes.axhline(max(sweep.ema_error, LOWEST), color=EMA, linestyle="--", label="EMA")
        means = [max(float(np.mean(sweep.errors[n])), LOWEST) for n in sizes]
        axes.plot(sizes, means, color=PRECISE, marker="o", label="PreciseBN, mean of draws", zorder=3)
        for n in sizes:
            draws = [max(error, LOWEST) for error in sweep.errors[n]]
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


def _error_axis(axes: Axes, errors: npt.NDArray[np.float64]) -> None:
    """A log axis in plain percent: at the end a tenth matters as much as ten points did at first."""
    lowest, highest = float(max(errors.min(), LOWEST)), float(errors.max())
    axes.set_yscale("log")
    bottom, top = lowest * 0.85, min(highest * 1.18, 115.0)
    axes.set_ylim(bottom, top)
    mantissas = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if highest < 5 * lowest else (1, 1.5, 2, 3, 5, 7)
    ticks = [mantissa * 10.0**power for power in (-1, 0, 1, 2) for mantissa in mantissas]
    if sum(bottom <= tick <= min(top, 100.0) for tick in ticks) < 3:  # a narrow range
        ticks = list(MaxNLocator(4).tick_values(bottom, top))
    shown = [tick for tick in ticks if bottom <= tick <= min(top, 100.0)]
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    axes.set_ylabel("validation error (%)")
