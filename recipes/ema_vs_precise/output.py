"""What the results are turned into: figures, `report.md`, `report.json` and the W&B runs.

W&B gets one run a training; a last run, the report, holds both curves once more with the figures and the
verdicts, to be read on its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from lightning_bn import plots
from recipes.claims import Claim
from recipes.ema_vs_precise.experiment import Cloud, Results, Sweep, unconverged_and_final
from recipes.evaluation import mean_and_spread
from recipes.report import claims_table, write_report
from recipes.tolerance import plain, tolerance_section

REPORT = """\
# EMA against PreciseBN: `{preset}`

{data}, {training_images:,} training and {validation_images:,} validation images; {training}; {seeds}.
Took {seconds:.0f} s on {machine}.

## What the paper says, and what was measured

{claims}

Errors are validation errors in percent. Verdicts follow the fixed rules of
`recipes/claims.py`: the ± of a difference is the half-width of its 95 % interval, over
repetitions or over validation images, whichever is wider. What the interval cannot decide is *within
noise*.

## Over training (Fig. 3 and 4)

![Validation error over the epochs](ema_vs_precise.png)

{curves}

The last column is a hash of all parameters of the EMA arm, one a seed, and says whether the PreciseBN arm's
are the same: the two arms are one model, evaluated twice. PreciseBN looks at {pass_images:,} images before every
validation, {share:.0f} % of an epoch's (the paper's 1e4 are 0.8 % of ImageNet's), and only forward; the seconds are
in W&B as `precise_bn/seconds`.

## Against the number of samples (Table 1)

![Validation error against the number of samples](samples.png)

{samples}

± is the standard deviation over {draws} draws of N training images, without replacement and in batches of
at most {batch_size:,}. The last N is the whole training population, which can be drawn in one way only.
{samples_needed}
## One channel (Fig. 2)

![EMA and batch means of one channel](ema_cloud.png)

Every dot is the channel's mean over one training batch, under the weights of that step. The channel shown
is the one whose EMA is as far from the population mean, early in training, as that of the network's median
channel.

`python -m recipes.ema_vs_precise --config config.yaml` repeats this run ({versions}).
"""


def draw(results: Results) -> dict[str, Figure]:
    """The three figures by file name."""
    ema, precise = results.of("EMA"), results.of("PreciseBN")
    title = "Same weights, two kinds of statistics"
    return {
        "ema_vs_precise": plots.error_curves(
            ema[0].epochs, [run.errors for run in ema], [run.errors for run in precise], title=title
        ),
        "samples": plots.error_against_samples(
            [
                plots.SampleSweep(
                    title=f"epoch {epoch:.3g}",
                    ema_error=100 * float(torch.cat([s.ema for s in sweeps]).mean()),
                    errors={n: _errors_at(sweeps, n) for n in sweeps[0].precise},
                )
                for epoch, sweeps in _by_epoch(results.sweeps).items()
            ]
        ),
        "ema_cloud": _draw_cloud(results.cloud),
    }


def _draw_cloud(cloud: Cloud) -> Figure:
    """Fig. 2 for a typical channel: the one whose early EMA is as far off as the median channel's."""
    steps = sorted(cloud.batch_means)
    early = steps[unconverged_and_final(len(steps))[0]]
    distance = (cloud.ema[early - 1] - cloud.batch_means[early].mean(0)).abs() / cloud.std[early]
    column = int(distance.median(0).indices)
    layer, channel = cloud.channels[column]
    means = {step: batches[:, column] for step, batches in sorted(cloud.batch_means.items())}
    trace = plots.ChannelTrace(
        title=f"{layer.removeprefix('network.')}, channel {channel}",
        steps=range(1, len(cloud.ema) + 1),
        ema=cloud.ema[:, column].tolist(),
        batches={step: batches.tolist() for step, batches in means.items()},
        precise={step: float(batches.mean()) for step, batches in means.items()},
    )
    return plots.channels_over_steps([trace])


def write(
    folder: Path,
    results: Results,
    verdicts: Sequence[Claim],
    figures: Mapping[str, Figure],
    about: Mapping[str, Any],
) -> list[Path]:
    """Writes the figures and both reports; returns their paths."""
    return write_report(folder, _markdown(results, verdicts, about), _plain(results, verdicts, about), figures)


def log_curves(logger: WandbLogger, results: Results) -> None:
    """Logs both arms' errors to the report's W&B run."""
    for index, step in enumerate(results.runs[0].steps):
        errors = {f"val_error/{run.arm}, seed {run.seed}": run.errors[index] for run in results.runs}
        logger.log_metrics({**errors, "epoch": results.runs[0].epochs[index]}, step)


def samples_table(sweeps: Sequence[Sweep]) -> list[str]:
    """Table 1."""
    sizes = sorted(sweeps[0].precise)
    lines = [
        "| epoch | EMA | " + " | ".join(f"N={n:,}" for n in sizes) + " |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for epoch, rows in _by_epoch(sweeps).items():
        ema = f"{100 * float(torch.cat([row.ema for row in rows]).mean()):.1f}"
        cells = [mean_and_spread(*(row.precise[n] for row in rows)) for n in sizes]
        lines.append(f"| {epoch:.3g} | {ema} | " + " | ".join(cells) + " |")
    return lines


def _curves_table(results: Results) -> list[str]:
    ema, precise = results.of("EMA"), results.of("PreciseBN")
    lines = ["| epoch | EMA | PreciseBN | parameters |", "|---|---|---|---|"]
    for index, epoch in enumerate(ema[0].epochs):
        cells = [_mean_and_range([run.errors[index] for run in arm]) for arm in (ema, precise)]
        hashes = [(a.weights[index], b.weights[index]) for a, b in zip(ema, precise, strict=True)]
        same = "equal" if all(a == b for a, b in hashes) else "**differ**"
        lines.append(f"| {epoch:.3g} | {cells[0]} | {cells[1]} | {same}: {', '.join(a for a, _ in hashes)} |")
    return lines


def _markdown(results: Results, verdicts: Sequence[Claim], about: Mapping[str, Any]) -> str:
    seeds = len(results.of("EMA"))
    return REPORT.format(
        **about,
        data=results.data,
        training_images=results.training_images,
        validation_images=results.validation_images,
        seeds=f"{seeds} seeds; errors are means over seeds" if seeds > 1 else "1 seed",
        claims="\n".join(claims_table(verdicts)),
        curves="\n".join(_curves_table(results)),
        samples="\n".join(samples_table(results.sweeps)),
        samples_needed=tolerance_section(results.stops),
        draws=max(len(wrong) for wrong in results.sweeps[0].precise.values()),
        share=100 * about["pass_images"] / results.training_images,
    )


def _plain(results: Results, verdicts: Sequence[Claim], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "recipe": "ema_vs_precise",
        "about": dict(about),
        "data": results.data,
        "training_images": results.training_images,
        "validation_images": results.validation_images,
        "claims": [asdict(claim) for claim in verdicts],
        "runs": [
            {
                "arm": run.arm,
                "seed": run.seed,
                "epochs": run.epochs,
                "steps": run.steps,
                "errors": run.errors,
                "weights": run.weights,
                "seconds": run.seconds,
            }
            for run in results.runs
        ],
        "samples_needed": plain(results.stops),
        "samples": [
            {
                "seed": sweep.seed,
                "epoch": sweep.epoch,
                "ema_error": 100 * float(sweep.ema.mean()),
                "errors": {str(n): (100 * wrong.mean(1)).tolist() for n, wrong in sweep.precise.items()},
            }
            for sweep in results.sweeps
        ],
    }


def _by_epoch(sweeps: Sequence[Sweep]) -> dict[float, list[Sweep]]:
    epochs = sorted({sweep.epoch for sweep in sweeps})
    return {epoch: [sweep for sweep in sweeps if sweep.epoch == epoch] for epoch in epochs}


def _errors_at(sweeps: Sequence[Sweep], n: int) -> list[float]:
    return [100 * float(error) for sweep in sweeps for error in sweep.precise[n].mean(1)]


def _mean_and_range(errors: Sequence[float]) -> str:
    mean = sum(errors) / len(errors)
    return f"{mean:.1f}" + (f" ({min(errors):.1f} to {max(errors):.1f})" if len(errors) > 1 else "")
