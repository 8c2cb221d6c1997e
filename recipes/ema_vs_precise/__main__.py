"""The command and its report.

    python -m recipes.ema_vs_precise --preset demo
    python -m recipes.ema_vs_precise --preset demo --trainer.max_epochs 5 --model.lr 0.3 --seeds [0,1]
    python -m recipes.ema_vs_precise --preset full --data-root ~/data/cifar-10-batches-py --data.shift 4
    python -m recipes.ema_vs_precise --preset demo --print_config > mine.yaml
    python -m recipes.ema_vs_precise --config mine.yaml

The figures in docs/assets are the demo's:
    cp runs/ema_vs_precise/demo/ema_*.png docs/assets/
and monitor_overview.png is the figure bn/overview of its first W&B run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import PositiveInt
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

import lightning_bn as lbn
from lightning_bn import plots
from recipes import classifier, figures
from recipes.ema_vs_precise import LISTING
from recipes.ema_vs_precise.claims import judge
from recipes.ema_vs_precise.experiment import Cloud, Results, Sweep, measure, unconverged_and_final
from recipes.evaluation import mean_and_spread
from recipes.images import FASHION_MNIST, ImageData
from recipes.run import Recipe, quiet_lightning, run
from recipes.tolerance import tolerance_section

DEFAULTS: dict[str, Any] = {
    **classifier.TRAINER,
    "monitor.every_n_batches": 1,
    "monitor.window": 8,
}  # an epoch has few batches
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data.train_images": 1000,
        "data.val_images": 500,
        "data.batch_size": 100,
        "model.lr": 0.3,
        "trainer.max_epochs": 2,
        "samples": [10, 100],
        "draws": 2,
        "cloud_batches": 5,
    },
    "demo": {"trainer.max_epochs": 12},
    "full": {
        "data_root": FASHION_MNIST,
        "data.train_images": 30_000,
        "data.batch_size": 1000,
        "trainer.max_epochs": 12,
        "seeds": [0, 1, 2],
        "samples": [10, 100, 1000, 10_000],
        "cloud_batches": 30,
    },
}
SECTIONS = """\
## Over training (Fig. 3 and 4)

![Validation error over the epochs](ema_vs_precise.png)

{curves}

The last column is a hash of all parameters, one per seed. If it is equal, both trainings have the same weights.
PreciseBN takes {pass_images:,} images before every validation, {share:.0f} % of an epoch (the paper's 1e4 are 0.8 % of
ImageNet). It runs the forward only; W&B has the seconds as `precise_bn/seconds`.

## Against the number of samples (Table 1)

![Validation error against the number of samples](samples.png)

{samples}

± is the standard deviation over {draws} draws of N training images, without replacement and in batches of at most
{batch_size:,}. The last N is the whole training population, of which there is one draw.
{tolerances}
## One channel (Fig. 2)

![EMA and batch means of one channel](ema_cloud.png)

Each dot is the mean of the channel over one training batch, with the weights of that step. The channel is the one
whose early EMA has the median distance from the population mean.
"""


class EMAVsPrecise(Recipe[Results]):
    """Evaluates every checkpoint of one training with EMA and with PreciseBN statistics."""

    name, listing = "ema_vs_precise", LISTING
    title = "EMA against PreciseBN"
    unit = "Errors are validation errors in percent."
    defaults, presets = DEFAULTS, PRESETS
    measure = staticmethod(measure)
    claims = staticmethod(judge)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--samples", type=list[PositiveInt], default=[10, 100, 1000], help="the N of Table 1")
        parser.add_argument("--draws", type=PositiveInt, default=5, help="draws of N images, for the spread")
        parser.add_argument("--cloud_batches", type=PositiveInt, default=16, help="batches of each step in Fig. 2")
        parser.add_argument(
            "--tolerances", type=list[float], default=[], help="show where precise_bn(tolerance=) stops"
        )
        classifier.add_arguments(parser, ImageData)
        parser.add_class_arguments(lbn.PreciseBNCallback, "precise_bn")
        parser.add_class_arguments(lbn.BNStatsMonitor, "monitor")

    def setting(self, results: Results, config: Namespace) -> str:
        images = f"{results.training_images:,} training and {results.validation_images:,} validation images"
        return f"{results.data}, {images}; {classifier.training(config, config.data.batch_size)}"

    def figures(self, results: Results) -> dict[str, Figure]:
        ema, precise = results.of("EMA"), results.of("PreciseBN")
        sweeps = []
        for epoch, of_epoch in results.sweeps_by_epoch().items():
            ema_error = 100 * float(torch.cat([sweep.ema for sweep in of_epoch]).mean())
            errors = {n: [e for sweep in of_epoch for e in sweep.errors(n)] for n in of_epoch[0].precise}
            sweeps.append(figures.SampleSweep(f"epoch {epoch:.3g}", ema_error, errors))
        xlabel, title = "training images N used for the statistics", "Same weights, two kinds of statistics"
        of_ema, of_precise = ([training.errors for training in arm] for arm in (ema, precise))
        return {
            "ema_vs_precise": figures.error_curves(ema[0].epochs, of_ema, of_precise, title=title),
            "samples": figures.error_against_samples(sweeps, xlabel=xlabel),
            "ema_cloud": _draw_cloud(results.cloud),
        }

    def table(self, results: Results) -> list[str]:
        """Table 1."""
        sizes = sorted(results.sweeps[0].precise)
        lines = [f"| epoch | EMA | {' | '.join(f'N={n:,}' for n in sizes)} |", "|---" * (len(sizes) + 2) + "|"]
        for epoch, sweeps in results.sweeps_by_epoch().items():
            ema = f"{100 * float(torch.cat([sweep.ema for sweep in sweeps]).mean()):.1f}"
            cells = [mean_and_spread(*(sweep.precise[n] for sweep in sweeps)) for n in sizes]
            lines.append(f"| {epoch:.3g} | {ema} | {' | '.join(cells)} |")
        return lines

    def sections(self, results: Results, config: Namespace) -> str:
        return SECTIONS.format(
            curves="\n".join(_curves_table(results)),
            pass_images=config.precise_bn.num_samples,
            share=100 * config.precise_bn.num_samples / results.training_images,
            samples="\n".join(self.table(results)),
            draws=config.draws,
            batch_size=config.data.batch_size,
            tolerances=tolerance_section(results.stops),
        )

    def as_json(self, results: Results) -> dict[str, Any]:
        counts = {"training_images": results.training_images, "validation_images": results.validation_images}
        trainings = [{k: v for k, v in vars(training).items() if k != "states"} for training in results.trainings]
        samples = [_plain(sweep) for sweep in results.sweeps]
        stops = [stop.as_json() for stop in results.stops]
        return {"data": results.data, **counts, "runs": trainings, "samples_needed": stops, "samples": samples}

    def log(self, logger: WandbLogger, results: Results) -> None:
        first = results.trainings[0]
        for index, step in enumerate(first.steps):
            errors = {f"val_error/{t.arm}, seed {t.seed}": t.errors[index] for t in results.trainings}
            logger.log_metrics({**errors, "epoch": first.epochs[index]}, step)


def _plain(sweep: Sweep) -> dict[str, Any]:
    errors = {str(n): sweep.errors(n) for n in sweep.precise}
    return {"seed": sweep.seed, "epoch": sweep.epoch, "ema_error": 100 * float(sweep.ema.mean()), "errors": errors}


def _curves_table(results: Results) -> list[str]:
    ema, precise = results.of("EMA"), results.of("PreciseBN")
    lines = ["| epoch | EMA | PreciseBN | parameters |", "|---|---|---|---|"]
    for index, epoch in enumerate(ema[0].epochs):
        cells = [_mean_and_range([training.errors[index] for training in arm]) for arm in (ema, precise)]
        hashes = [(a.weights[index], b.weights[index]) for a, b in zip(ema, precise, strict=True)]
        same = "equal" if all(a == b for a, b in hashes) else "**differ**"
        lines.append(f"| {epoch:.3g} | {cells[0]} | {cells[1]} | {same}: {', '.join(a for a, _ in hashes)} |")
    return lines


def _mean_and_range(errors: Sequence[float]) -> str:
    mean = sum(errors) / len(errors)
    return f"{mean:.1f}" + (f" ({min(errors):.1f} to {max(errors):.1f})" if len(errors) > 1 else "")


def _draw_cloud(cloud: Cloud) -> Figure:
    """Fig. 2 for a typical channel: its early EMA has the median distance from the population mean."""
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


def main(arguments: Sequence[str] | None = None) -> Path:
    return run(EMAVsPrecise(), arguments)


if __name__ == "__main__":
    quiet_lightning()
    main()
