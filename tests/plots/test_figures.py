"""Figures show what they were given, in the project's style, without a display and without pyplot."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_bn import plots
from lightning_bn.plots.style import EMA


def trace(name: str = "bn1, channel 0") -> plots.ChannelTrace:
    clouds = {2: [0.5, 0.7], 4: [0.4, 0.6]}
    return plots.ChannelTrace(name, [1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4], clouds, {2: 0.6, 4: 0.5})


def line(figure: Figure, label: str) -> Line2D:
    return next(line for line in figure.axes[0].lines if line.get_label() == label)


def test_a_channel_shows_its_ema_every_batch_and_the_population_mean() -> None:
    figure = plots.channels_over_steps([trace()])
    (axes,) = figure.axes
    population = line(figure, "population mean (PreciseBN)")
    assert list(population.get_xdata()) == [2, 4] and list(population.get_ydata()) == [0.6, 0.5]
    ema = line(figure, "EMA (running_mean)")
    assert list(ema.get_xdata()) == [1, 2, 3, 4] and ema.get_color() == EMA
    dots = line(figure, "batch means, weights fixed")
    assert list(dots.get_ydata()) == [0.5, 0.7, 0.4, 0.6]
    assert np.round(dots.get_xdata()).tolist() == [1, 3, 3, 5] and axes.get_title("left") == "bn1, channel 0"


def test_one_batch_per_step_is_drawn_at_its_step() -> None:
    figure = plots.channels_over_steps([trace()._replace(batches={1: [0.3], 2: [0.4], 3: [float("nan")]}, precise={})])
    assert list(line(figure, "batch means").get_xdata()) == [1, 2, 3]
    assert "population mean (PreciseBN)" not in [other.get_label() for other in figure.axes[0].lines]


def test_every_channel_gets_a_panel_and_none_is_an_error() -> None:
    for count in (1, 2, 5, 9):
        figure = plots.channels_over_steps([trace(f"bn{index}") for index in range(count)], title="t")
        titles = [axes.get_title("left") for axes in figure.axes if axes.get_visible()]
        assert titles == [f"bn{index}" for index in range(count)]
    with pytest.raises(ValueError, match="at least one ChannelTrace"):
        plots.channels_over_steps([])


def test_leakage_is_drawn_by_layer_with_three_sigma_of_noise() -> None:
    figure = plots.leakage_by_layer({"a": 0.5, "b": 0.01}, noise={"a": 0.1, "b": 0.02}, p_value=0.01)
    assert list(line(figure, "measured").get_xdata()) == [0.5, 0.01]
    assert [bar.get_width() for bar in figure.axes[0].containers[0]] == pytest.approx([0.6, 0.12])
    assert figure.axes[0].get_title("left").endswith("p = 0.01")


def test_matplotlib_settings_of_the_user_have_no_effect_and_stay_and_pyplot_has_no_figure() -> None:
    pyplot.close("all")
    plain = plots.to_rgb(plots.channels_over_steps([trace()]))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "xtick.labelsize": 40}):
        assert np.array_equal(plain, plots.to_rgb(plots.channels_over_steps([trace()])))
        assert matplotlib.rcParams["font.size"] == 30
    assert plain.dtype == np.uint8 and plain.shape[2] == 3 and (plain[0, 0] == 255).all()
    assert pyplot.get_fignums() == []
