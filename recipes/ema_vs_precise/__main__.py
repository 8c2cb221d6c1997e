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

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined, unused-ignore]
from lightning.pytorch.loggers import Logger

import lightning_bn as lbn
from recipes.classifier import ImageClassifier
from recipes.ema_vs_precise import RECIPE, output
from recipes.ema_vs_precise.claims import claims
from recipes.ema_vs_precise.experiment import Arm, Parts, ema_vs_precise
from recipes.images import FASHION_MNIST, ImageData

EVERY_PRESET = {
    "trainer.devices": 1,
    "trainer.deterministic": True,
    "trainer.log_every_n_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_checkpointing": False,
    "trainer.enable_model_summary": False,
    "trainer.enable_progress_bar": False,  # a line an epoch says more
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
    parser.add_argument("--seeds", type=list[int], default=[0], help="a pair of training runs each")
    parser.add_argument("--samples", type=list[int], default=[10, 100, 1000], help="the N of Table 1")
    parser.add_argument("--draws", type=int, default=5, help="draws of N images, for the spread")
    parser.add_argument("--cloud_batches", type=int, default=16, help="batch means in each cloud of Fig. 2")
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


def quiet_lightning() -> None:
    """Lets warnings through but not what every single Trainer has to say about devices and loggers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6 on torch 2.15; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the command; returns the folder it wrote to."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the defaults depend on the preset
    first.add_argument("--preset", choices=PRESETS, default="demo")
    parser = make_parser(first.parse_known_args(arguments)[0].preset)
    config = parser.parse_args(arguments)
    preset = config.preset
    folder: Path = config.out or Path("runs/ema_vs_precise") / preset
    folder.mkdir(parents=True, exist_ok=True)
    settings = parser.dump(config, skip_link_targets=True)
    (folder / "config.yaml").write_text(settings, encoding="utf-8")

    run_folders: list[Path] = []

    def make() -> Parts:
        made = parser.instantiate(config)
        return Parts(made.model, made.data, made.precise_bn, made.monitor, made.trainer.as_dict())

    def make_logger(arm: Arm, seed: int) -> Logger:
        logger = output.wandb_logger(f"{arm}, seed {seed}", arm, preset, folder, config.as_dict())
        run_folders.append(Path(logger.experiment.dir).parent)
        return logger

    print(f"{RECIPE.paper}: {RECIPE.shows}. On {output.machine()}.")
    started = time.perf_counter()
    results = ema_vs_precise(
        make,
        make_logger,
        seeds=config.seeds,
        samples=config.samples,
        draws=config.draws,
        cloud_batches=config.cloud_batches,
    )
    verdicts, figures = claims(results), output.draw(results)
    about = {
        "preset": preset,
        "training": f"{config.model.network}, SGD, batch {config.data.batch_size:,}, "
        f"learning rate {config.model.lr:g} on a cosine, {results.runs[0].epochs[-1]:g} epochs",
        "batch_size": config.data.batch_size,
        "pass_images": config.precise_bn.num_samples,
        "seconds": time.perf_counter() - started,
        "machine": output.machine(),
        "versions": output.versions(),
    }
    paths = output.write(folder, results, verdicts, figures, about)
    report = output.wandb_logger("report", "report", preset, folder, config.as_dict())
    run_folder = output.log_report(report, results, verdicts, figures)

    print("", *output.samples_table(results.sweeps), sep="\n")
    for claim in verdicts:
        print(f"\n{claim.verdict.upper()}: {claim.claim}\n  paper: {claim.paper}\n  here:  {claim.measured}")
    print("", *paths, sep="\n")
    print("\nWhat BNStatsMonitor saw in the EMA's run, as one HTML page")
    print(f"  {os.path.relpath(sys.executable)} -m lightning_bn.report {run_folders[0]}")
    print("\nIn W&B, without a login: all runs (space overlays one more), or the report (3 shows its figures)")
    print(f"  {output.wandb_command()} leet {run_folder.parent}\n  {output.wandb_command()} leet {run_folder}")
    return folder


if __name__ == "__main__":
    quiet_lightning()
    main()
