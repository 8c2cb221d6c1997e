"""Figures show what they were given, in the project's style, without a display and without pyplot."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_bn import plots
from lightning_bn.plots.style import EMA, PRECISE


def curves() -> Figure:
    return plots.error_curves([1, 2, 3], [[90, 48, 3.4], [88, 40, 3.6]], [[41, 18, 3.5], [39, 17, 3.3]], title="t")


def samples() -> Figure:
    sweep = plots.SampleSweep("epoch 3", 15.4, {10: [9.0, 13.0], 100: [7.0, 7.4], 4000: [6.6]})
    return plots.error_against_samples([sweep, sweep])


def trace(name: str = "bn1, channel 0") -> plots.ChannelTrace:
    clouds = {2: [0.5, 0.7], 4: [0.4, 0.6]}
    return plots.ChannelTrace(name, [1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4], clouds, {2: 0.6, 4: 0.5})


def cloud() -> Figure:
    return plots.channels_over_steps([trace()])


def line(figure: Figure, label: str, panel: int = 0) -> Line2D:
    return next(line for line in figure.axes[panel].lines if line.get_label() == label)


def test_error_curves_show_the_mean_over_seeds_and_a_band_from_best_to_worst() -> None:
    figure = curves()
    assert line(figure, "EMA").get_ydata() == pytest.approx([89, 44, 3.5])
    assert line(figure, "PreciseBN").get_ydata() == pytest.approx([40, 17.5, 3.4])
    bands = figure.axes[0].collections
    heights = bands[0].get_paths()[0].vertices[:, 1]
    assert len(bands) == 2 and heights.min() == pytest.approx(3.4) and heights.max() == 90


def test_every_error_lies_inside_the_axes_even_a_perfect_one() -> None:
    figure = plots.error_curves([1, 2], [[100, 0.0]], [[50, 0.2]])
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 0.2 and high > 100
    ticks = figure.axes[0].get_yticks()
    assert ((low <= ticks) & (ticks <= 100)).all(), "no tick above 100 % and none outside"


def test_error_against_samples_joins_the_means_and_shows_every_draw() -> None:
    figure = samples()
    assert len(figure.axes) == 2
    means = line(figure, "PreciseBN, mean of draws")
    assert list(means.get_xdata()) == [10, 100, 4000]
    assert means.get_ydata() == pytest.approx([11.0, 7.2, 6.6])
    dots = sum(len(other.get_ydata()) for other in figure.axes[0].lines if other.get_alpha())
    assert dots == 5
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["10", "100", "4k"]


def test_what_the_samples_are_can_be_said_otherwise() -> None:
    sweep = plots.SampleSweep("NBS 2", 35.5, {2: [34.4], 100: [32.0]})
    assert plots.error_against_samples([sweep], xlabel="B").axes[0].get_xlabel() == "B"


def depth() -> Figure:
    gaps = {"B = 2": [(0.0, 0.0), (0.01, 0.1), (0.02, 0.4)], "B = 10": [(0.0, 0.0), (0.002, 0.02), (0.004, 0.1)]}
    return plots.gaps_in_depth([plots.DepthProfile("NBS 32", gaps, [(0.1, 0.2)] * 3)] * 2)


def test_gaps_in_depth_show_means_above_variances_and_leave_zeros_out() -> None:
    figure = depth()
    assert len(figure.axes) == 4
    assert list(line(figure, "B = 2").get_xdata()) == [1, 2, 3]
    assert line(figure, "B = 2").get_ydata() == pytest.approx([np.nan, 0.01, 0.02], nan_ok=True)
    assert line(figure, "B = 10", panel=2).get_ydata() == pytest.approx([np.nan, 0.02, 0.1], nan_ok=True)
    assert line(figure, "EMA").get_color() == EMA


def leakage() -> Figure:
    seeds = ([50.0, 40.0, 51.0], [50.0, 42.0, 53.0])
    silent = plots.LeakageCurves("random", seeds, [[50.0, 40.0, 24.0]], [[50.0, 40.0, 24.0]])
    leaking = plots.LeakageCurves("pattern", seeds, [[50.0, 40.0, 31.0]], [[50.0, 40.0, 23.0]], alarms=[1, 2])
    return plots.leakage_curves([silent, leaking])


def test_leakage_curves_show_three_statistics_and_the_alarms() -> None:
    figure = leakage()
    assert list(line(figure, "population", panel=1).get_ydata()) == [50.0, 41.0, 52.0]
    assert list(line(figure, "mini-batch, same pattern", panel=1).get_ydata()) == [50.0, 40.0, 23.0]
    assert list(line(figure, "mini-batch, random").get_xdata()) == [1, 2, 3]
    assert list(line(figure, "alarm", panel=1).get_xdata()) == [1, 1]
    assert len(figure.axes[1].lines) - len(figure.axes[0].lines) == 2, "an alarm a seed, and none where it is silent"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_a_channel_shows_its_ema_every_batch_and_the_population_mean() -> None:
    figure = cloud()
    (axes,) = figure.axes
    population = line(figure, "population mean (PreciseBN)")
    assert list(population.get_xdata()) == [2, 4] and list(population.get_ydata()) == [0.6, 0.5]
    assert list(line(figure, "EMA (running_mean)").get_xdata()) == [1, 2, 3, 4]
    dots = line(figure, "batch means, weights fixed")
    assert list(dots.get_ydata()) == [0.5, 0.7, 0.4, 0.6]
    assert np.round(dots.get_xdata()).tolist() == [1, 3, 3, 5] and axes.get_title("left") == "bn1, channel 0"


def test_one_batch_a_step_is_drawn_at_its_step() -> None:
    figure = plots.channels_over_steps([trace()._replace(batches={1: [0.3], 2: [0.4], 3: [float("nan")]}, precise={})])
    assert list(line(figure, "batch means").get_xdata()) == [1, 2, 3]
    assert "population mean (PreciseBN)" not in [other.get_label() for other in figure.axes[0].lines]


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_every_channel_gets_a_panel_of_its_own(count: int) -> None:
    figure = plots.channels_over_steps([trace(f"bn{index}") for index in range(count)], title="t")
    shown = [axes.get_title("left") for axes in figure.axes if axes.get_visible()]
    assert shown == [f"bn{index}" for index in range(count)]


def test_no_channel_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="at least one ChannelTrace"):
        plots.channels_over_steps([])


def test_a_color_means_the_same_in_every_figure() -> None:
    assert line(curves(), "EMA").get_color() == line(samples(), "EMA").get_color() == EMA
    assert line(cloud(), "EMA (running_mean)").get_color() == EMA
    assert line(curves(), "PreciseBN").get_color() == PRECISE


def test_the_users_matplotlib_settings_neither_matter_nor_change() -> None:
    plain = plots.to_rgb(curves())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "xtick.labelsize": 40}):
        styled = plots.to_rgb(curves())
        assert matplotlib.rcParams["font.size"] == 30
    assert np.array_equal(plain, styled)


def test_to_rgb_gives_pixels_of_three_channels() -> None:
    pixels = plots.to_rgb(curves())
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert (pixels[0, 0] == 255).all() and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_figures_leave_nothing_in_pyplot() -> None:
    pyplot.close("all")
    for figure in (curves(), samples(), cloud(), depth(), leakage()):
        plots.to_rgb(figure)
    assert pyplot.get_fignums() == []
