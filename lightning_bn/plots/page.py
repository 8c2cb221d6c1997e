"""One self-contained HTML page of a logged run: no script, no request to anywhere, to be read offline or sent on."""

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from lightning_bn.plots.drift import aggregates_over_steps, gap_heatmap
from lightning_bn.plots.runs import LoggedRun, Table
from lightning_bn.plots.style import to_png
from lightning_bn.tracking.drift import AGGREGATES

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ --paper: #fbfbfa; --card: #ffffff; --ink: #1d1f23; --soft: #62666e; --line: #e2e3e6; --accent: #b34f00; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #15171b; --card: #1e2126; --ink: #e6e7ea; --soft: #9da2ab; --line: #33373f; --accent: #ff9a4d; }}
  img {{ filter: brightness(0.88); }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 2.2rem 1.2rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .7rem; padding-top: 1rem; border-top: 1px solid var(--line); }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 .5rem; }}
p {{ max-width: 46rem; }}
.soft, dt, caption, figcaption, summary {{ color: var(--soft); }}
dl {{ display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 0; }}
dt {{ font-size: .8rem; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
figure, .scroll, details {{ margin: 1rem 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }}
figure img {{ display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 6px; }}
figcaption {{ font-size: .85rem; margin-top: .5rem; }}
details figure {{ padding: 0; border: 0; }}
summary {{ cursor: pointer; }}
.scroll {{ overflow: auto; max-height: 34rem; padding: 0 .8rem .4rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th {{ position: sticky; top: 0; background: var(--card); text-align: left; font-weight: 600; padding-top: .7rem; }}
th, td {{ padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }}
tr:last-child td {{ border-bottom: 0; }}
.number {{ text-align: right; }}
td:last-child:not(.number) {{ white-space: normal; min-width: 14rem; }}
.bad {{ color: var(--accent); font-weight: 600; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""

_QUANTITIES = {
    "mean_gap": "mean gap (σ)",
    "var_gap": "variance gap (log ratio)",
    "lag": "lag (σ)",
    "noise": "noise (σ)",
    "var_lag": "lag of the variance (log ratio)",
    "var_noise": "noise of the variance (log ratio)",
    "dead": "dead channels (fraction)",
    "nonfinite": "channels not finite (fraction)",
}
_MEANING = {
    "mean_gap": "how far the batches' means lie from the EMA's, in the EMA's σ",
    "var_gap": "log of the batches' variance over the EMA's; 0.7 is a factor of two",
    "lag": "what of the mean gap stays when batches are averaged: a stale EMA",
    "noise": "how far the batches' means scatter: a small normalization batch",
    "dead_channels": "channels without variance",
    "nonfinite_layers": "layers with a statistic that is NaN or infinite",
}


def run_page(run: LoggedRun, *, title: str = "") -> str:
    """The whole page for `run`, as HTML.

    Args:
        run: What `read_run` returned.
        title: The page's heading; by default it is made from the run's name.
    """
    title = title or f"BatchNorm drift: {run.about.get('name', run.about.get('id', 'run'))}"
    together, by_layer = _aggregates_and_layers(run)
    steps = [step for series in run.scalars.values() for step, _ in series]
    span = {"steps": f"{min(steps)} to {max(steps)}"} if steps else {}
    parts = [f"<h1>{escape(title)}</h1>", _about({**run.about, **span})]
    if not (run.scalars or run.images or run.tables):
        parts.append(
            "<p>This run has no key that starts with <code>bn</code>: no <code>BNStatsMonitor</code> was on.</p>"
        )
    for prefix in together:
        parts += _all_layers(run, prefix, together[prefix])
    if by_layer:
        parts.append("<h2>Layer by layer</h2>")
    for prefix, keys in by_layer.items():
        parts += _heatmap(run, prefix, keys)
    if run.images:
        parts.append("<h2>Pictures from the run</h2>")
    for key, pictures in sorted(run.images.items(), key=lambda pair: (not pair[0].endswith("overview"), pair[0])):
        parts += _pictures(key, pictures)
    if run.tables:
        parts.append("<h2>Tables from the run</h2>")
    for key, table in sorted(run.tables.items()):
        shown = _table(table)
        if "key" in table.columns:  # the layers' names, which are used all over the page
            parts.append(f"<details><summary>{escape(key)}</summary>{shown}</details>")
        else:
            parts += [f"<h3>{escape(key)}</h3>", shown]
    return PAGE.format(title=escape(title), body="\n".join(parts))


def _aggregates_and_layers(run: LoggedRun) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The scalars' keys by what stands before their `/`: those of all layers together, and those of single layers."""
    together: dict[str, list[str]] = {}
    by_layer: dict[str, list[str]] = {}
    for key in sorted(run.scalars, key=lambda key: (key.partition("/")[0] != "bn_agg", key)):
        prefix = key.partition("/")[0]
        of = together if "agg" in prefix.split("_") else by_layer
        of.setdefault(prefix, []).append(key)
    return together, by_layer


def _about(about: dict[str, str]) -> str:
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in about.items())
    return f"<dl>{''.join(items)}</dl>"


def _all_layers(run: LoggedRun, prefix: str, keys: Sequence[str]) -> Iterable[str]:
    monitor = prefix.replace("_agg", "", 1)
    yield f"<h2>All layers together{'' if monitor == 'bn' else f': {escape(monitor)}'}</h2>"
    series = {key.partition("/")[2]: run.scalars[key] for key in keys}
    names = sorted(series, key=lambda name: AGGREGATES.index(name) if name in AGGREGATES else len(AGGREGATES))
    rows = []
    for name in names:
        if name != "worst_layer":
            # Infinite is worst of all, and NaN says nothing.
            step, worst = max(series[name], key=lambda pair: -math.inf if math.isnan(pair[1]) else pair[1])
            meaning = _MEANING.get(re.sub(r"_(p\d+|max)$", "", name), "")
            rows.append([name, series[name][-1][1], worst, step, meaning])
    yield _table(Table(["figure", "last", "worst", "at step", "what it is"], rows))
    if "worst_layer" in series:
        worst_layers = [_layer_of(run, monitor, number) for _, number in series["worst_layer"]]
        often, times = Counter(worst_layers).most_common(1)[0]
        last, often = escape(worst_layers[-1]), escape(often)
        share = f"{times} of {len(worst_layers)} rows"
        yield f"<p>Largest mean gap at the end: <b>{last}</b>; most often: <b>{often}</b>, in {share}.</p>"
    drawn: dict[str, Any] = {name: tuple(zip(*series[name], strict=True)) for name in names if name in AGGREGATES}
    if drawn.keys() - {"worst_layer"}:
        yield _image(to_png(aggregates_over_steps(drawn)), "redrawn from the logged numbers")


def _heatmap(run: LoggedRun, prefix: str, keys: Sequence[str]) -> Iterable[str]:
    layers = sorted((*_place_of(run, key.partition("/")[2]), key) for key in keys)
    steps = sorted({step for key in keys for step, _ in run.scalars[key]})
    row_of = {step: row for row, step in enumerate(steps)}
    gaps = np.full((len(steps), len(keys)), np.nan)
    for column, (_, _, key) in enumerate(layers):
        for step, value in run.scalars[key]:
            gaps[row_of[step], column] = value
    # The longest, because var_lag is no lag.
    known = max((name for name in _QUANTITIES if prefix.endswith(f"_{name}")), key=len, default="")
    quantity = _QUANTITIES.get(known, prefix)
    figure = gap_heatmap(steps, [name for _, name, _ in layers], gaps, quantity=quantity, title=prefix)
    yield _image(to_png(figure), f"{_MEANING.get(known, quantity)}; redrawn from the logged numbers")


def _place_of(run: LoggedRun, key: str) -> tuple[tuple[Any, ...], str]:
    """Where a layer stands in the model and its real name, if these were logged; else its place by name."""
    for table in run.tables.values():
        if {"index", "layer", "key"} <= set(table.columns):
            index, layer, of_key = (list(table.columns).index(column) for column in ("index", "layer", "key"))
            for row in table.rows:
                if row[of_key] == key:
                    return (0, int(row[index])), str(row[layer])
    parts = re.split(r"(\d+)", key)  # layer2 before layer10
    return (1, *((int(part), "") if part.isdigit() else (0, part) for part in parts)), key


def _layer_of(run: LoggedRun, monitor: str, number: float) -> str:
    """The name of the worst layer, which is logged by its number."""
    for name in (f"{monitor}_layers", f"{monitor}/layers"):
        if (table := run.tables.get(name)) and {"index", "layer"} <= set(table.columns) and math.isfinite(number):
            index, layer = list(table.columns).index("index"), list(table.columns).index("layer")
            for row in table.rows:
                if int(row[index]) == number:
                    return str(row[layer])
    return f"number {_number(number)}"


def _pictures(key: str, pictures: Sequence[tuple[int, bytes]]) -> Iterable[str]:
    *earlier, (step, latest) = pictures
    yield f"<h3>{escape(key)}</h3>"
    yield _image(latest, f"step {step}")
    if earlier:
        inside = "".join(_image(picture, f"step {step}") for step, picture in reversed(earlier))
        yield f"<details><summary>{len(earlier)} earlier</summary>{inside}</details>"


def _image(png: bytes, caption: str) -> str:
    source, caption = base64.b64encode(png).decode(), escape(caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _table(table: Table) -> str:
    numeric = [all(_is_numeric(row[i]) for row in table.rows) for i in range(len(table.columns))]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f"<th{kind}>{escape(str(name))}</th>" for kind, name in zip(kinds, table.columns, strict=True))
    lines = (
        "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _is_numeric(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return cell in (None, "")
    return True


def _cell(cell: Any) -> str:
    if cell is None or not _is_numeric(cell) or re.fullmatch(r"-?\d*", str(cell)):
        return escape("–" if cell is None else str(cell))
    number = float(cell)
    if math.isnan(number):
        return "–"  # not measured
    return _number(number) if math.isfinite(number) else f'<span class="bad">{number}</span>'


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e9 else f"{value:.3g}"
