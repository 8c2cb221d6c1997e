"""The one visual style of the project: what every figure function is drawn under.

Colours are Okabe and Ito's, which stay apart under every common colour blindness, and each has one meaning
everywhere: EMA is vermilion, PreciseBN is blue, the data (batches) is grey.
"""

import functools
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

EMA = "#D55E00"
PRECISE = "#0072B2"
BATCHES = "#8C8C8C"

STYLE: dict[str, Any] = {
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#4D4D4D",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "xtick.color": "#4D4D4D",
    "ytick.color": "#4D4D4D",
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "legend.frameon": False,
}

Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Makes a figure function draw in the project's style, whatever the user's matplotlib settings."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with matplotlib.style.context(["default", STYLE]):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made when drawn: make them while the style holds
        return figure

    return drawn


def new_figure(width: float = 6.4, height: float = 4.0) -> Figure:
    """An empty figure with an Agg canvas, `width` by `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_rgb(figure: Figure) -> npt.NDArray[np.uint8]:
    """The figure's pixels, `(height, width, 3)`: the one form that every logger takes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(figure: Figure, path: str | PathLike[str]) -> Path:
    """Writes the figure to `path`, making its folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path
