"""What the results are turned into: a figure, `report.md` and `report.json`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes.average_precision import ONE_SEED, beside_the_papers, mean_ap
from recipes.claims import Claim
from recipes.report import claims_table, write_report
from recipes.roi_head_leakage.claims import PAPER, Cell, measured
from recipes.roi_head_leakage.experiment import TRAININGS, Results, Row

REPORT = """\
# BatchNorm in an R-CNN head: `{preset}`

{data}; {training}; {steps:,} steps of {images_per_step} images on {ranks} ranks;
{validation_images:,} validation images; {seeds}. Took {seconds:.0f} s on {machine}.

## What the paper says, and what was measured

{claims}

APs are COCO's, in percent. Verdicts follow the fixed rules of `recipes/claims.py`: the ± of a difference is the
half-width of its 95 % interval, over seeds or over parts of the validation images, whichever is wider; equal means
within one point. What the interval cannot decide is *within noise*.

## Tables 3 and 6

{table}

![Box AP by row, beside the paper's](ap.png)

All trainings of a seed see the same images in the same order and take the same steps: with one image a rank, gradients
are accumulated. Mini-batch statistics are those of the one image that is evaluated. The paper shuffled among more GPUs
than the {ranks} ranks here.

`python -m recipes.roi_head_leakage --config config.yaml` repeats this run ({versions}).
"""


def draw(results: Results) -> dict[str, Figure]:
    """The figures by file name."""
    return {"ap": beside_the_papers({_words(cell): measured(results, cell) for cell, _ in _cells(results)})}


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
        seeds=f"{seeds} seeds; APs are means over seeds" if seeds > 1 else ONE_SEED,
        claims="\n".join(claims_table(verdicts)),
        table="\n".join(ap_table(results)),
    )
    plain = {
        "recipe": "roi_head_leakage",
        "about": dict(about),
        "claims": [asdict(claim) for claim in verdicts],
        **asdict(results),
    }
    return write_report(folder, markdown, plain, figures)


def ap_table(results: Results) -> list[str]:
    """The rows of Tables 3 and 6, beside the paper's box and mask AP."""
    lines = ["| head norm | images a GPU | inference | paper | box AP | mask AP |", "|---" * 6 + "|"]
    for (key, inference), rows in _cells(results):
        training = TRAININGS[key]
        box, mask = PAPER[key, inference]
        statistics = inference if training.norm == "BN" else "-"
        cells = [training.name, str(training.images_per_gpu), statistics, f"{box} / {mask}"]
        lines.append(f"| {' | '.join(cells)} | {_mean_box_ap(rows):.1f} | {_mean_mask_ap(rows)} |")
    return lines


def summary(results: Results) -> dict[str, float]:
    """Box AP of every row, for W&B."""
    return {f"box_AP/{key}/{inference}": _mean_box_ap(rows) for (key, inference), rows in _cells(results)}


def _cells(results: Results) -> Iterator[tuple[Cell, list[Row]]]:
    """Those that were measured, in the order of the tables."""
    for cell in PAPER:
        rows = results.of(*cell)
        if rows:
            yield cell, rows


def _words(cell: Cell) -> str:
    training = TRAININGS[cell[0]]
    statistics = f", {cell[1]}" if training.norm == "BN" else ""
    return f"{training.name}, {training.images_per_gpu} a GPU{statistics}"


def _mean_box_ap(rows: Sequence[Row]) -> float:
    return mean_ap([row.box for row in rows])


def _mean_mask_ap(rows: Sequence[Row]) -> str:
    found = [row.mask for row in rows if row.mask is not None]
    return f"{mean_ap(found):.1f}" if found else "-"
