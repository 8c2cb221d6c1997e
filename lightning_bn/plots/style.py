"""The one visual style of the project: what every figure function is drawn under.

Colors are Okabe and Ito's, which stay apart under every common color blindness, and each has one meaning
everywhere: EMA is vermilion, PreciseBN is blue, the data (batches) is grey.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

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


def short_names(names: Sequence[str], *, longest: int = 40) -> list[str]:
    """Names that fit beside a figure: without the leading modules that all share, and with `…` for a middle too long.

    Different names stay different, be it at the price of more than `longest` characters.

    Example:
        >>> short_names(["model.backbone.layer1.bn", "model.backbone.layer2.bn"], longest=12)
        ['layer1.bn', 'layer2.bn']
    """
    names = [name.replace("$", r"\$") for name in names]  # else it is typeset as mathematics
    if names and max(map(len, names)) > longest and len(set(names)) > 1:
        parts = [name.split(".") for name in names]
        shared = next(i for i in range(max(map(len, parts)) + 1) if len({tuple(p[: i + 1]) for p in parts}) > 1)
        shared -= shared > 0 and any(part[shared : shared + 1] and part[shared].isdigit() for part in parts)
        names = [".".join(part[shared:]) or name for part, name in zip(parts, names, strict=True)]
    while True:
        head, tail = longest // 3, longest - longest // 3 - 1
        short = [
            name if len(name) <= longest else f"{name[:head].rstrip('.')}…{name[-tail:].lstrip('.')}" for name in names
        ]
        if len(set(short)) == len(set(names)):
            return short
        longest += 6


def step_axis(axes: Axes) -> None:
    """Training steps along x: whole numbers, thousands as `k`."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"))
    axes.set_xlabel("training step")


def legend_above(figure: Figure, handles: Mapping[str, Artist], title: str) -> None:
    """One legend for all panels, in a row under the figure's title."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=len(handles), fontsize=9)


def to_rgb(figure: Figure) -> npt.NDArray[np.uint8]:
    """The figure's pixels, `(height, width, 3)`: the one form that every logger takes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(figure: Figure, path: str | PathLike[str]) -> Path:
    """Writes the figure to `path`, making its folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(figure))
    return path


def to_png(figure: Figure) -> bytes:
    """The figure as the contents of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
