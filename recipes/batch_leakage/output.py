"""What the results are turned into: the figure, `report.md` and `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_bn import plots
from recipes.batch_leakage.claims import alarm_in_words
from recipes.batch_leakage.experiment import ARMS, NAMES, STATISTICS, Results, Run
from recipes.claims import Claim
from recipes.report import claims_table, write_report

REPORT = """\
# Do batches of {pattern} leak? `{preset}`

{data}, {classes} classes; an epoch is {training_images:,} training images, an error {validation_images:,} validation
images; {training}; {seeds}. Took {seconds:.0f} s on {machine}.

## What the paper says, and what was measured

{claims}

Errors are validation errors in percent. Verdicts follow the fixed rules of `recipes/claims.py`: the ± of a
difference is the half-width of its 95 % interval, over seeds or over validation images, whichever is wider. What the
interval cannot decide is *within noise*.

## Validation error over the epochs (Fig. 8)

![Validation error with population and mini-batch statistics](batch_leakage.png)

{errors}

*random*: training batches are random. *pattern*: each is {pattern} images. *Ghost BN*: the same batches, of which each
layer normalizes one image of every class together. Population statistics are the EMA's. *Same pattern* is measured on
other draws of the validation images than the other two: compare it with its own curve under *random*, too.

## What BatchLeakageMonitor said

{alarms}

At level {level:g}. A positive correlation: samples that a layer normalizes together are alike; a negative one: they are
balanced, as Ghost BN makes them, with no class twice. An alarm is final, so that the monitor then rests.

`python -m recipes.batch_leakage --config config.yaml` repeats this run ({versions}).
"""


def draw(results: Results) -> dict[str, Figure]:
    """The figure by file name."""
    panels = []
    for arm in ARMS:
        runs = results.of(arm)
        population, mini_batch, same_pattern = ([run.errors[statistics] for run in runs] for statistics in STATISTICS)
        alarms = [run.alarm for run in runs if run.alarm is not None]
        panels.append(plots.LeakageCurves(arm, population, mini_batch, same_pattern, alarms))
    return {"batch_leakage": plots.leakage_curves(panels)}


def write(
    folder: Path,
    results: Results,
    verdicts: Sequence[Claim],
    figures: Mapping[str, Figure],
    about: Mapping[str, Any],
) -> list[Path]:
    """Writes the figure and both reports; returns their paths."""
    seeds = len(results.of("random"))
    markdown = REPORT.format(
        **about,
        data=results.data,
        classes=results.classes,
        pattern=results.pattern,
        training_images=results.training_images,
        validation_images=results.validation_images,
        level=results.level,
        seeds=f"{seeds} seeds; errors are means over seeds" if seeds > 1 else "1 seed",
        claims="\n".join(claims_table(verdicts)),
        errors="\n".join(errors_table(results)),
        alarms="\n".join(_alarms_table(results.runs)),
    )
    return write_report(folder, markdown, _plain(results, verdicts, about), figures)


def errors_table(results: Results) -> list[str]:
    """The curves of Fig. 8 at some ten epochs."""
    epochs = len(results.runs[0].errors["population"])
    shown = sorted({max(1, round(epochs * part / 10)) for part in range(1, 11)})
    columns = " | ".join(map(str, shown))
    lines = [f"| trained with | statistics, epoch | {columns} |", "|---" * (len(shown) + 2) + "|"]
    for arm in ARMS:
        runs = results.of(arm)
        for number, statistics in enumerate(STATISTICS):
            means = [sum(run.errors[statistics][epoch - 1] for run in runs) / len(runs) for epoch in shown]
            cells = " | ".join(f"{mean:.1f}" for mean in means)
            lines.append(f"| {'' if number else arm} | {NAMES[statistics]} | {cells} |")
    return lines


def _alarms_table(runs: Sequence[Run]) -> list[str]:
    lines = [
        "| trained with | seed | the monitor | correlation of the most conspicuous layer, by epoch |",
        "|---" * 4 + "|",
    ]
    for run in runs:
        by_epoch = ", ".join(f"{value:+.3f}" for value in run.icc)
        lines.append(f"| {run.arm} | {run.seed} | {alarm_in_words(run)} | {by_epoch} |")
    return lines


def _plain(results: Results, verdicts: Sequence[Claim], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "recipe": "batch_leakage",
        "about": dict(about),
        **asdict(results),
        "claims": [asdict(claim) for claim in verdicts],
    }
