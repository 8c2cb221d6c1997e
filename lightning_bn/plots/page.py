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
td.number {{ text-align: right; }}
th.number {{ text-align: right; }}
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
}
_MEANING = {
    "mean_gap": "how far the batches' means lie from the EMA's, in the EMA's σ",
    "var_gap": "log of the batches' variance over the EMA's; 0.7 is a factor of two",
    "lag": "what of the mean gap stays when batches are averaged: a stale EMA",
    "noise": "how far the batches' means scatter: a small normalization batch",
    "worst_layer": "the layer with the largest mean gap",
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
    together = _by_prefix(key for key in run.scalars if key.startswith("bn_agg"))
    by_layer = _by_prefix(key for key in run.scalars if not key.startswith("bn_agg"))
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
    for key, pictures in sorted(run.images.items()):
        parts += _pictures(key, pictures)
    if run.tables:
        parts.append("<h2>Tables from the run</h2>")
    for key, table in sorted(run.tables.items()):
        parts += [f"<h3>{escape(key)}</h3>", _table(table)]
    return PAGE.format(title=escape(title), body="\n".join(parts))


def _by_prefix(keys: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for key in sorted(keys):
        grouped.setdefault(key.partition("/")[0], []).append(key)
    return grouped


def _about(about: dict[str, str]) -> str:
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in about.items())
    return f"<dl>{''.join(items)}</dl>"


def _all_layers(run: LoggedRun, prefix: str, keys: Sequence[str]) -> Iterable[str]:
    tag = prefix.removeprefix("bn_agg").strip("_")
    yield f"<h2>All layers together{f': {escape(tag)}' if tag else ''}</h2>"
    rows = []
    for key in keys:
        name = key.partition("/")[2]
        series = run.scalars[key]
        family = re.sub(r"_(p\d+|max)$", "", name)
        if name == "worst_layer":
            names = [_layer_of(run, tag, value) for _, value in series]
            often, times = Counter(names).most_common(1)[0]
            cells = [names[-1], f"{often}, {100 * times / len(names):.0f} % of the time", ""]
        else:
            # Infinite is worst of all, and NaN says nothing.
            step, worst = max(series, key=lambda pair: -math.inf if math.isnan(pair[1]) else pair[1])
            cells = [_number(series[-1][1]), _number(worst), str(step)]
        rows.append([name, *cells, _MEANING.get(family, "")])
    yield _table(Table(["figure", "last", "worst", "at step", "what it is"], rows))
    series_of = {key.partition("/")[2]: tuple(zip(*run.scalars[key], strict=True)) for key in keys}
    known = {name: series for name, series in series_of.items() if re.sub(r"_(p\d+|max)$", "", name) in _MEANING}
    if set(known) - {"worst_layer"}:
        yield _image(to_png(aggregates_over_steps(known)), "redrawn from the logged numbers")  # type: ignore[arg-type]


def _heatmap(run: LoggedRun, prefix: str, keys: Sequence[str]) -> Iterable[str]:
    places = [_place_of(run, key.partition("/")[2]) for key in keys]
    order = sorted(range(len(keys)), key=lambda i: places[i][0])
    steps = sorted({step for key in keys for step, _ in run.scalars[key]})
    row_of = {step: row for row, step in enumerate(steps)}
    gaps = np.full((len(steps), len(keys)), np.nan)
    for column, index in enumerate(order):
        for step, value in run.scalars[keys[index]]:
            gaps[row_of[step], column] = value
    family = next((name for name in _QUANTITIES if prefix.startswith(f"bn_{name}")), "")
    quantity = _QUANTITIES.get(family, prefix)
    figure = gap_heatmap(steps, [places[i][1] for i in order], gaps, quantity=quantity, title=prefix)
    yield _image(to_png(figure), f"{_MEANING.get(family, quantity)}; redrawn from the logged numbers")


def _place_of(run: LoggedRun, safe: str) -> tuple[tuple[Any, ...], str]:
    """Where a layer stands and its real name, if the names were logged; else its place among them by name."""
    for table in _name_tables(run):
        for row in table.rows:
            for cell in row[1:]:
                if isinstance(cell, str) and safe in (cell, cell.replace(".", "_")):
                    # Both the real and the safe name may be in the row: the longer way to write it is the real one.
                    real = next((c for c in row[1:] if isinstance(c, str) and c.replace(".", "_") == safe), cell)
                    return (0, int(row[0])), real
    natural = tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", safe))
    return (1, natural), safe


def _layer_of(run: LoggedRun, tag: str, index: float) -> str:
    tables = sorted(run.tables.items(), key=lambda pair: (tag not in pair[0], len(pair[0])))
    for _, table in tables:
        if table.columns[:1] == ["index"] and math.isfinite(index):
            for row in table.rows:
                if int(row[0]) == int(index):
                    return next((str(cell) for cell in row[1:] if isinstance(cell, str)), _number(index))
    return _number(index)


def _name_tables(run: LoggedRun) -> list[Table]:
    return [table for table in run.tables.values() if table.columns[:1] == ["index"]]


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
    if cell is None:
        return "–"
    if isinstance(cell, str) and not re.fullmatch(r"-?\d+\.\d+(e-?\d+)?|nan|inf", cell):
        return escape(cell)
    number = float(cell)
    text = escape(_number(number))
    return text if math.isfinite(number) else f'<span class="bad">{text}</span>'


def _number(value: float) -> str:
    return (
        f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e9 else f"{value:.3g}" if value == value else "nan"
    )
