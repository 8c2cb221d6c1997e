"""What the results are turned into: a figure, `report.md` and `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes.average_precision import ONE_SEED, beside_the_papers, mean_ap
from recipes.claims import Claim
from recipes.report import claims_table, write_report
from recipes.shared_head.claims import PAPER, measured
from recipes.shared_head.experiment import ROWS, Results

REPORT = """\
# BatchNorm in a head that all levels share: `{preset}`

{data}; {training}, {levels} levels; {steps:,} steps of {images_per_step} images on {on};
{validation_images:,} validation images; {seeds}. Took {seconds:.0f} s on {machine}.

## What the paper says, and what was measured

{claims}

APs are COCO's, in percent. Verdicts follow the fixed rules of `recipes/claims.py`: the ± of a difference is the
half-width of its 95 % interval, over seeds or over parts of the validation images, whichever is wider; equal means
within one point. What the interval cannot decide is *within noise*.

## Table 5

{table}

![Box AP by row, beside the paper's](ap.png)

Rows 1 and 2 are one training, so are 3 and 4, 5 and 6; all three see the same images in the same order. Population
statistics are PreciseBN's, from training images and the trained weights.

`python -m recipes.shared_head --config config.yaml` repeats this run ({versions}).
"""


def draw(results: Results) -> dict[str, Figure]:
    """The figures by file name."""
    return {"ap": beside_the_papers({_words(row): measured(results, row) for row in _rows(results)})}


def write(
    folder: Path,
    results: Results,
    verdicts: Sequence[Claim],
    figures: Mapping[str, Figure],
    about: Mapping[str, Any],
) -> list[Path]:
    """Writes the figures and both reports; returns their paths."""
    seeds = len({row.seed for row in results.rows})
    markdown = REPORT.format(
        **about,
        **{name: value for name, value in vars(results).items() if name != "rows"},
        on=f"{results.ranks} ranks" if results.ranks > 1 else "one rank",
        seeds=f"{seeds} seeds; APs are means over seeds" if seeds > 1 else ONE_SEED,
        claims="\n".join(claims_table(verdicts)),
        table="\n".join(ap_table(results)),
    )
    plain = {
        "recipe": "shared_head",
        "about": dict(about),
        "claims": [asdict(claim) for claim in verdicts],
        **asdict(results),
    }
    return write_report(folder, markdown, plain, figures)


def ap_table(results: Results) -> list[str]:
    """The rows of Table 5, beside the paper's AP."""
    lines = ["| row | SGD | population | affine | paper | AP |", "|---" * 6 + "|"]
    for row in _rows(results):
        cells = [str(row), *ROWS[row], str(PAPER[row])]
        lines.append(f"| {' | '.join(cells)} | {mean_ap(measured(results, row).aps):.1f} |")
    return lines


def summary(results: Results) -> dict[str, float]:
    """Box AP of every row, for W&B."""
    return {f"box_AP/row_{row}": mean_ap(measured(results, row).aps) for row in _rows(results)}


def _rows(results: Results) -> list[int]:
    """Those that were measured, in the order of the table."""
    return [row for row in ROWS if results.of(row)]


def _words(row: int) -> str:
    sgd, population, affine = ROWS[row]
    return f"{row}: SGD {sgd}, population {population}" + (", affine domain" if affine == "domain" else "")
