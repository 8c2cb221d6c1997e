"""What the results are turned into: figures, `report.md`, `report.json` and the W&B runs.

W&B gets one run a training, all in one group and with the same keys, so that its charts overlay EMA and
PreciseBN; a last run, the report, holds both curves once more with the figures and the verdicts, to be read
on its own.
"""

import json
import netrc
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from lightning_bn import plots
from recipes.ema_vs_precise.claims import Claim
from recipes.ema_vs_precise.experiment import Cloud, Results, Sweep, mean_and_spread, unconverged_and_final

REPORT = """\
# EMA against PreciseBN: `{preset}`

{data}, {training_images:,} training and {validation_images:,} validation images; {training}; {seeds}.
Took {seconds:.0f} s on {machine}.

## What the paper says, and what was measured

{claims}

Errors are validation errors in percent. Verdicts follow the fixed rules of
`recipes/ema_vs_precise/claims.py`: the ± of a difference is the half-width of its 95 % interval, over
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

## One channel (Fig. 2)

![EMA and batch means of one channel](ema_cloud.png)

Every dot is the channel's mean over one training batch, under the weights of that step. The channel shown
is the one whose EMA is as far from the population mean, early in training, as that of the network's median
channel.

`python -m recipes.ema_vs_precise --config config.yaml` repeats this run ({versions}).
"""


def wandb_logger(name: str, job: str, preset: str, folder: Path, config: Mapping[str, Any]) -> WandbLogger:
    """A logger with a W&B run of its own, offline unless the user is logged in or `WANDB_MODE` says other."""
    wandb.finish()  # a WandbLogger would go on writing to a run that is still open
    run = wandb.init(
        project="lightning_bn",
        group=f"ema_vs_precise/{preset}",
        job_type=job,
        name=name,
        dir=folder,
        config=dict(config),
        mode=None if "WANDB_MODE" in os.environ or _logged_in() else "offline",
        settings=wandb.Settings(silent=True, console="off"),
    )
    # WandbLogger defines its axis only for runs that it makes itself.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run)


def _logged_in() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def wandb_command() -> str:
    """How to call wandb from here: by name if that finds it, else the one beside this Python."""
    beside = Path(sys.executable).parent / "wandb"
    return "wandb" if shutil.which("wandb") else os.path.relpath(beside)


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
    paths = [plots.save_png(figure, folder / f"{name}.png") for name, figure in figures.items()]
    (folder / "report.md").write_text(_markdown(results, verdicts, about), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(_plain(results, verdicts, about), indent=1), encoding="utf-8")
    return [folder / "report.md", folder / "report.json", *paths]


def log_report(logger: WandbLogger, results: Results, verdicts: Sequence[Claim], figures: Mapping[str, Figure]) -> Path:
    """Logs curves, figures and verdicts to the report's W&B run, closes it, and returns its folder."""
    for index, step in enumerate(results.runs[0].steps):
        errors = {f"val_error/{run.arm}, seed {run.seed}": run.errors[index] for run in results.runs}
        logger.log_metrics({**errors, "epoch": results.runs[0].epochs[index]}, step)
    for name, figure in figures.items():
        plots.log_figure(logger, f"figures/{name}", figure, results.runs[0].steps[-1])
    run = logger.experiment
    columns: list[str | int] = ["claim", "paper", "measured", "verdict"]
    run.log({"claims": wandb.Table(columns=columns, data=[list(asdict(claim).values()) for claim in verdicts])})
    for verdict in ("holds", "does not hold", "within noise"):
        run.summary[f"claims/{verdict}"] = sum(claim.verdict == verdict for claim in verdicts)
    folder = Path(run.dir).parent
    wandb.finish()
    wandb.teardown()  # finish() may return before the file is complete
    return folder


def claims_table(verdicts: Sequence[Claim]) -> list[str]:
    lines = ["| claim | paper | measured here | verdict |", "|---|---|---|---|"]
    return lines + [f"| {c.claim} | {c.paper} | {c.measured} | **{c.verdict}** |" for c in verdicts]


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


def machine() -> str:
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread{'s' * (threads > 1)}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device} ({platform.system()} {platform.machine()})"


def versions() -> str:
    return f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"


def _by_epoch(sweeps: Sequence[Sweep]) -> dict[float, list[Sweep]]:
    epochs = sorted({sweep.epoch for sweep in sweeps})
    return {epoch: [sweep for sweep in sweeps if sweep.epoch == epoch] for epoch in epochs}


def _errors_at(sweeps: Sequence[Sweep], n: int) -> list[float]:
    return [100 * float(error) for sweep in sweeps for error in sweep.precise[n].mean(1)]


def _mean_and_range(errors: Sequence[float]) -> str:
    mean = sum(errors) / len(errors)
    return f"{mean:.1f}" + (f" ({min(errors):.1f} to {max(errors):.1f})" if len(errors) > 1 else "")
