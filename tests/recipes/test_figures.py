"""The figures of recipes show what they were given."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_bn.plots.style import EMA, PRECISE
from recipes import figures


def line(figure: Figure, label: str, panel: int = 0) -> Line2D:
    return next(line for line in figure.axes[panel].lines if line.get_label() == label)


def test_error_curves_show_the_mean_over_seeds_and_their_range() -> None:
    figure = figures.error_curves([1, 2, 3], [[90, 48, 3.4], [88, 40, 3.6]], [[41, 18, 3.5], [39, 17, 3.3]], title="t")
    assert line(figure, "EMA").get_ydata() == pytest.approx([89, 44, 3.5])
    assert line(figure, "PreciseBN").get_ydata() == pytest.approx([40, 17.5, 3.4])
    assert (line(figure, "EMA").get_color(), line(figure, "PreciseBN").get_color()) == (EMA, PRECISE)
    bands = figure.axes[0].collections
    heights = bands[0].get_paths()[0].vertices[:, 1]
    assert len(bands) == 2 and heights.min() == pytest.approx(3.4) and heights.max() == 90


def test_error_against_samples_joins_the_means_and_shows_every_draw() -> None:
    sweep = figures.SampleSweep("epoch 3", 15.4, {10: [9.0, 13.0], 100: [7.0, 7.4], 4000: [6.6]})
    figure = figures.error_against_samples([sweep, sweep], xlabel="N")
    assert len(figure.axes) == 2 and figure.axes[0].get_xlabel() == "N"
    means = line(figure, "PreciseBN, mean of draws")
    assert list(means.get_xdata()) == [10, 100, 4000]
    assert means.get_ydata() == pytest.approx([11.0, 7.2, 6.6])
    assert sum(len(other.get_ydata()) for other in figure.axes[0].lines if other.get_alpha()) == 5
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["10", "100", "4k"]


def test_gaps_in_depth_show_means_above_variances_and_leave_zeros_out() -> None:
    gaps = {"B = 2": [(0.0, 0.0), (0.01, 0.1), (0.02, 0.4)], "B = 10": [(0.0, 0.0), (0.002, 0.02), (0.004, 0.1)]}
    figure = figures.gaps_in_depth([figures.DepthProfile("NBS 32", gaps, [(0.1, 0.2)] * 3)] * 2)
    assert len(figure.axes) == 4 and list(line(figure, "B = 2").get_xdata()) == [1, 2, 3]
    assert line(figure, "B = 2").get_ydata() == pytest.approx([np.nan, 0.01, 0.02], nan_ok=True)
    assert line(figure, "B = 10", panel=2).get_ydata() == pytest.approx([np.nan, 0.02, 0.1], nan_ok=True)


def test_leakage_curves_show_three_statistics_and_the_alarms() -> None:
    seeds = ([50.0, 40.0, 51.0], [50.0, 42.0, 53.0])
    silent = figures.LeakageCurves("random", seeds, [[50.0, 40.0, 24.0]], [[50.0, 40.0, 24.0]])
    leaking = figures.LeakageCurves("pattern", seeds, [[50.0, 40.0, 31.0]], [[50.0, 40.0, 23.0]], alarms=[1, 2])
    figure = figures.leakage_curves([silent, leaking])
    assert list(line(figure, "population", panel=1).get_ydata()) == [50.0, 41.0, 52.0]
    assert list(line(figure, "mini-batch, same pattern", panel=1).get_ydata()) == [50.0, 40.0, 23.0]
    assert list(line(figure, "mini-batch, random").get_xdata()) == [1, 2, 3]
    assert list(line(figure, "alarm", panel=1).get_xdata()) == [1, 1]
    assert len(figure.axes[1].lines) - len(figure.axes[0].lines) == 2, "an alarm per seed"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_ap_by_row_shows_every_seed_beside_the_papers_number() -> None:
    here, paper = figures.ap_by_row({"one": ([1.0, 2.0], 30.0), "two": ([3.0], 40.0)}).axes
    assert [list(drawn.get_xdata()) for drawn in here.lines] == [[1.0, 2.0], [1.5], [3.0]]
    assert [list(drawn.get_xdata()) for drawn in paper.lines] == [[30.0], [40.0]]
