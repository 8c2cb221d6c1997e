"""The visual style of all figures.

Colors are Okabe and Ito's, which stay distinct under every common color blindness. Each has one meaning: the EMA is
vermilion, PreciseBN is blue, batches are grey.
"""

import functools
import io
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

EMA = "#D55E00"
PRECISE = "#0072B2"
BATCHES = "#8C8C8C"
DARK = "#4D4D4D"

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
    "axes.edgecolor": DARK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "legend.frameon": False,
}
_SHEETS: list[Any] = ["default", STYLE]

Arguments = ParamSpec("Arguments")


class StyledFigure(Figure):
    """A figure that is always drawn in the project's style, since matplotlib creates ticks only while drawing."""

    def draw(self, renderer: RendererBase) -> None:
        with matplotlib.style.context(_SHEETS):
            super().draw(renderer)
        self.set_layout_engine("none")  # else the next drawing would move the axes a little


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Makes a figure function use the project's style, whatever the user's matplotlib settings."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with matplotlib.style.context(_SHEETS):
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """Creates an empty figure with an Agg canvas; sizes in inches, the title at the top left."""
    figure = StyledFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def short_names(names: Sequence[str], *, max_length: int = 40) -> list[str]:
    """Shortens layer names: drops the leading modules that all share, then replaces the middle by `…`.

    Different names stay different, if necessary by exceeding `max_length`.
    """
    names = [name.replace("$", r"\$") for name in names]  # else matplotlib typesets it as mathematics
    if names and max(map(len, names)) > max_length and len(set(names)) > 1:
        parts = [name.split(".") for name in names]
        shared = next(i for i in range(max(map(len, parts)) + 1) if len({tuple(p[: i + 1]) for p in parts}) > 1)
        # Keep "layer" before "3" in "layer.3".
        shared -= shared > 0 and any(part[shared : shared + 1] and part[shared].isdigit() for part in parts)
        names = [".".join(part[shared:]) or name for part, name in zip(parts, names, strict=True)]
    while True:
        head, tail = max_length // 3, max_length - max_length // 3 - 1
        short = [n if len(n) <= max_length else f"{n[:head].rstrip('.')}…{n[-tail:].lstrip('.')}" for n in names]
        if len(set(short)) == len(set(names)):
            return short
        max_length += 6


def step_axis(axes: Axes) -> None:
    """Labels x with training steps: whole numbers, thousands as `k`."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"))
    axes.set_xlabel("training step")


def plain_log_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Labels 0.01, 0.1, 1 instead of powers; over less than three decades also 0.02, 0.05, and so on."""
    subs = (1.0,) if limits[1] > 1000 * limits[0] else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def to_rgb(figure: Figure) -> npt.NDArray[np.uint8]:
    """Renders the figure to pixels, `(height, width, 3)`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_png(figure: Figure) -> bytes:
    """Renders the figure to the contents of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def save_png(figure: Figure, path: str | PathLike[str]) -> Path:
    """Writes the figure to `path`, creating its folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(figure))
    return path
