"""The command, with LightningCLI's conventions for every setting.

    python -m recipes.ema_vs_precise --preset demo
    python -m recipes.ema_vs_precise --preset demo --trainer.max_epochs 5 --model.lr 0.3 --seeds [0,1]
    python -m recipes.ema_vs_precise --preset full --data-root ~/data/cifar-10-batches-py --data.shift 4
    python -m recipes.ema_vs_precise --preset demo --print_config > mine.yaml
    python -m recipes.ema_vs_precise --config mine.yaml

The pictures in docs/assets are the demo's:
    cp runs/ema_vs_precise/demo/ema_*.png docs/assets/
and monitor_overview.png is the picture bn/overview of its first W&B run.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.loggers import Logger

import lightning_bn as lbn
from recipes import report
from recipes.classifier import ImageClassifier
from recipes.command import TRAINER, quiet_lightning, read_arguments
from recipes.ema_vs_precise import RECIPE, output
from recipes.ema_vs_precise.claims import claims
from recipes.ema_vs_precise.experiment import Arm, Parts, ema_vs_precise
from recipes.images import FASHION_MNIST, ImageData

EVERY_PRESET = {
    **TRAINER,
    "monitor.every_n_batches": 1,  # an epoch has few
    "monitor.window": 8,
}
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
    "demo": {
        "data.batch_size": 250,
        "trainer.max_epochs": 12,
        "samples": [10, 100, 1000],
        "draws": 5,
        "cloud_batches": 16,
    },
    "full": {
        "data_root": FASHION_MNIST,
        "data.train_images": 30_000,
        "data.batch_size": 1000,
        "trainer.max_epochs": 12,
        "seeds": [0, 1, 2],
        "samples": [10, 100, 1000, 10_000],
        "draws": 5,
        "cloud_batches": 30,
    },
}


def make_parser(preset: str) -> ArgumentParser:
    """All arguments of data, model, PreciseBN and Trainer, with the preset's values as defaults."""
    parser = ArgumentParser(prog="python -m recipes.ema_vs_precise", description=RECIPE.shows)
    parser.add_argument("--config", action=ActionConfigFile, help="a file of settings, as --print_config prints them")
    parser.add_argument("--preset", type=Literal["smoke", "demo", "full"], default="demo")
    parser.add_argument("--data-root", type=Path | None, default=None, help=RECIPE.data)
    parser.add_argument("--out", type=Path | None, default=None, help="default: runs/ema_vs_precise/<preset>")
    parser.add_argument("--seeds", type=list[NonNegativeInt], default=[0], help="a pair of training runs each")
    parser.add_argument("--samples", type=list[PositiveInt], default=[10, 100, 1000], help="the N of Table 1")
    parser.add_argument("--draws", type=PositiveInt, default=5, help="draws of N images, for the spread")
    parser.add_argument("--cloud_batches", type=PositiveInt, default=16, help="batch means in each cloud of Fig. 2")
    parser.add_argument("--tolerances", type=list[float], default=[], help="see where precise_bn(tolerance=) stops")
    parser.add_class_arguments(ImageData, "data")
    parser.add_class_arguments(ImageClassifier, "model")
    parser.add_class_arguments(lbn.PreciseBNCallback, "precise_bn")
    parser.add_class_arguments(lbn.BNStatsMonitor, "monitor")
    parser.add_class_arguments(L.Trainer, "trainer", skip={"logger"}, instantiate=False, fail_untyped=False)
    parser.link_arguments("data_root", "data.root")
    parser.link_arguments("data.num_channels", "model.in_channels", apply_on="instantiate")
    parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
    parser.set_defaults({**EVERY_PRESET, **PRESETS[preset]})
    return parser


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the command; returns the folder it wrote to."""
    parser, config, folder = read_arguments(RECIPE.name, PRESETS, make_parser, arguments)
    preset = config.preset
    run_folders: list[Path] = []

    def make() -> Parts:
        made = parser.instantiate(config)
        return Parts(made.model, made.data, made.precise_bn, made.monitor, made.trainer.as_dict())

    def make_logger(arm: Arm, seed: int) -> Logger:
        logger = report.wandb_logger(RECIPE.name, preset, arm, f"{arm}, seed {seed}", folder, config.as_dict())
        run_folders.append(Path(logger.experiment.dir).parent)
        return logger

    print(f"{RECIPE.paper}: {RECIPE.shows}. On {report.machine()}.")
    started = time.perf_counter()
    results = ema_vs_precise(
        make,
        make_logger,
        seeds=config.seeds,
        samples=config.samples,
        draws=config.draws,
        cloud_batches=config.cloud_batches,
        tolerances=config.tolerances,
    )
    verdicts, figures = claims(results), output.draw(results)
    training = (
        f"{config.model.network}, SGD, batch {config.data.batch_size:,}, "
        f"learning rate {config.model.lr:g} on a cosine, {results.runs[0].epochs[-1]:g} epochs"
    )
    about = {
        **report.about(preset, training, started),
        "batch_size": config.data.batch_size,
        "pass_images": config.precise_bn.num_samples,
    }
    paths = output.write(folder, results, verdicts, figures, about)
    logger = report.wandb_logger(RECIPE.name, preset, "report", "report", folder, config.as_dict())
    output.log_curves(logger, results)
    report.conclude(
        logger, verdicts, figures, output.samples_table(results.sweeps), paths, step=results.runs[0].steps[-1]
    )
    print("\nWhat BNStatsMonitor saw in the EMA's run, as one HTML page")
    print(f"  {os.path.relpath(sys.executable)} -m lightning_bn.report {run_folders[0]}")
    return folder


if __name__ == "__main__":
    quiet_lightning()
    main()
