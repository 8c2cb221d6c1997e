"""One self-contained HTML page of a logged run: no script, no network access."""

import base64
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from lightning_bn.plots.drift import aggregates_over_steps, gap_heatmap
from lightning_bn.plots.style import to_png
from lightning_bn.report.runs import LoggedRun, Table, read_run
from lightning_bn.tracking.drift import AGGREGATES

_QUANTITIES = {
    "mean_gap": "mean gap (σ)",
    "var_gap": "variance gap (log ratio)",
    "lag": "lag (σ)",
    "noise": "noise (σ)",
    "var_lag": "lag of the variance (log ratio)",
    "var_noise": "noise of the variance (log ratio)",
    "dead": "dead channels (fraction)",
    "nonfinite": "non-finite channels (fraction)",
}
_MEANING = {
    "mean_gap": "distance of the batch means from the EMA's mean, in the EMA's σ",
    "var_gap": "log ratio of the batch variance to the EMA's; 0.7 is a factor of two",
    "lag": "the part of the mean gap that remains when batches are averaged: a stale EMA",
    "noise": "spread of the batch means: a small normalization batch",
    "dead_channels": "channels without variance",
    "nonfinite_layers": "layers with a NaN or infinite statistic",
}


def write_report(run: str | PathLike[str], *, out: str | PathLike[str] | None = None) -> Path:
    """Writes what `BNStatsMonitor` logged in a run as an HTML page; returns its path.

    Args:
        run: The folder of an offline W&B run, a TensorBoard log directory, or a CSVLogger's log directory.
        out: The file to write; by default `bn_report.html` in the run's folder.

    Raises:
        ValueError: `run` is none of the three.
        ImportError: `run` is a TensorBoard log, and `tensorboard` is not installed.
    """
    page = run_page(read_run(run))
    path = Path(out) if out else Path(run) / "bn_report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def run_page(run: LoggedRun) -> str:
    """Renders the page of `run` as HTML."""
    aggregates: dict[str, list[str]] = defaultdict(list)  # the part of a key before "/" -> keys
    by_layer: dict[str, list[str]] = defaultdict(list)
    for key in sorted(run.scalars, key=lambda key: (not key.startswith("bn_agg/"), key)):
        prefix = key.partition("/")[0]
        (aggregates if "agg" in prefix.split("_") else by_layer)[prefix].append(key)
    title = f"BatchNorm drift: {run.about.get('name', run.about.get('id', 'run'))}"
    steps = [step for series in run.scalars.values() for step, _ in series]
    about = {**run.about, **({"steps": f"{min(steps)} to {max(steps)}"} if steps else {})}
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in about.items())
    parts = [f"<h1>{escape(title)}</h1>", f"<dl>{''.join(items)}</dl>"]
    if not (run.scalars or run.images or run.tables):
        parts.append("<p>This run has no keys of <code>BNStatsMonitor</code>.</p>")
    for prefix, keys in aggregates.items():
        parts += _aggregates(run, prefix, keys)
    parts += ["<h2>Layer by layer</h2>"] * bool(by_layer)
    parts += [_heatmap(run, prefix, keys) for prefix, keys in by_layer.items()]
    parts += ["<h2>Figures from the run</h2>"] * bool(run.images)
    for key in sorted(run.images, key=lambda key: (not key.endswith("overview"), key)):
        parts += _pictures(key, run.images[key])
    parts += ["<h2>Tables from the run</h2>"] * bool(run.tables)
    for key, table in sorted(run.tables.items()):
        html = _table(table)
        if "key" in table.columns:  # the layers' names
            parts.append(f"<details><summary>{escape(key)}</summary>{html}</details>")
        else:
            parts += [f"<h3>{escape(key)}</h3>", html]
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(parts))


def _aggregates(run: LoggedRun, prefix: str, keys: Sequence[str]) -> Iterator[str]:
    monitor = prefix.replace("_agg", "", 1)
    yield f"<h2>All layers together{'' if monitor == 'bn' else f': {escape(monitor)}'}</h2>"
    series = {key.partition("/")[2]: run.scalars[key] for key in keys}
    worst_layer = series.pop("worst_layer", [])
    names = sorted(series, key=lambda name: AGGREGATES.index(name) if name in AGGREGATES else len(AGGREGATES))
    rows = []
    for name in names:
        step, worst = max(series[name], key=lambda pair: -math.inf if math.isnan(pair[1]) else pair[1])
        rows.append([name, series[name][-1][1], worst, step, _MEANING.get(re.sub(r"_(p\d+|max)$", "", name), "")])
    yield _table(Table(["quantity", "last", "worst", "at step", "meaning"], rows))
    if worst_layer:
        names_of = _layer_rows(run, (f"{monitor}/layers", f"{monitor}_layers"))
        by_number: dict[float, str] = {int(row["index"]): str(row["layer"]) for row in names_of}
        layers = [by_number.get(number, f"number {_number(number)}") for _, number in worst_layer]
        most, times = Counter(layers).most_common(1)[0]
        yield (
            f"<p>Largest mean gap at the end: <b>{escape(layers[-1])}</b>; most often: <b>{escape(most)}</b>, "
            f"in {times} of {len(layers)} rows.</p>"
        )
    drawn: dict[str, Any] = {name: tuple(zip(*series[name], strict=True)) for name in names if name in AGGREGATES}
    if drawn:
        yield _image(to_png(aggregates_over_steps(drawn)), "redrawn from the logged numbers")


def _heatmap(run: LoggedRun, prefix: str, keys: Sequence[str]) -> str:
    layers = sorted((*_place_of(run, key.partition("/")[2]), key) for key in keys)
    steps = sorted({step for key in keys for step, _ in run.scalars[key]})
    row_of = {step: row for row, step in enumerate(steps)}
    gaps = np.full((len(steps), len(keys)), np.nan)
    for column, (_, _, key) in enumerate(layers):
        for step, value in run.scalars[key]:
            gaps[row_of[step], column] = value
    # The longest match, because a key that ends with var_lag also ends with lag.
    quantity = max((name for name in _QUANTITIES if prefix.endswith(f"_{name}")), key=len, default="")
    label = _QUANTITIES.get(quantity, prefix)
    figure = gap_heatmap(steps, layers=[name for _, name, _ in layers], gaps=gaps, quantity=label, title=prefix)
    return _image(to_png(figure), f"{_MEANING.get(quantity, label)}; redrawn from the logged numbers")


def _place_of(run: LoggedRun, key: str) -> tuple[tuple[Any, ...], str]:
    """Returns the place of a layer in the model and its name, if names were logged; else a place by its key."""
    for row in _layer_rows(run, run.tables):
        if row.get("key") == key:
            return (0, int(row["index"])), str(row["layer"])
    parts = re.split(r"(\d+)", key)  # layer2 before layer10
    return (1, *((int(part), "") if part.isdigit() else (0, part) for part in parts)), key


def _layer_rows(run: LoggedRun, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
    for table in (run.tables[key] for key in keys if key in run.tables):
        if {"index", "layer"} <= set(table.columns):
            yield from (dict(zip(table.columns, row, strict=True)) for row in table.rows)


def _pictures(key: str, pictures: Sequence[tuple[int, bytes]]) -> Iterator[str]:
    *earlier, (step, latest) = pictures
    yield f"<h3>{escape(key)}</h3>"
    yield _image(latest, f"step {step}")
    if earlier:
        images = "".join(_image(picture, f"step {step}") for step, picture in reversed(earlier))
        yield f"<details><summary>{len(earlier)} earlier</summary>{images}</details>"


def _image(png: bytes, caption: str) -> str:
    source, caption = base64.b64encode(png).decode(), escape(caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _table(table: Table) -> str:
    numbers = [all(_as_number(row[i]) is not None for row in table.rows) for i in range(len(table.columns))]
    kinds = [' class="number"' if is_number else "" for is_number in numbers]
    head = "".join(f"<th{kind}>{escape(str(name))}</th>" for kind, name in zip(kinds, table.columns, strict=True))
    rows = ("".join(f"<td{kind}>{_cell(c)}</td>" for kind, c in zip(kinds, row, strict=True)) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _as_number(cell: Any) -> float | None:
    """Returns NaN for an empty cell, and None for a text."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan if cell in (None, "") else None


def _cell(cell: Any) -> str:
    number = _as_number(cell)
    if number is None or re.fullmatch(r"-?\d*", str(cell)):
        return escape(str(cell))
    if math.isnan(number):
        return "–"  # not measured
    return _number(number) if math.isfinite(number) else f'<span class="bad">{number}</span>'


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"
