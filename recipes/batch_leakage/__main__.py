"""The command, with LightningCLI's conventions for every setting.

    python -m recipes.batch_leakage --preset demo
    python -m recipes.batch_leakage --preset demo --data.classes 8 --data.each 4 --seeds [0,1]
    python -m recipes.batch_leakage --preset full --data-root ~/data/cifar-10-batches-py
    python -m recipes.batch_leakage --preset demo --print_config > mine.yaml
    python -m recipes.batch_leakage --config mine.yaml

The picture in docs/assets is the demo's:
    cp runs/batch_leakage/demo/batch_leakage.png docs/assets/
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import NonNegativeInt

from recipes import report
from recipes.batch_leakage import RECIPE, output
from recipes.batch_leakage.claims import claims
from recipes.batch_leakage.data import LeakyData
from recipes.batch_leakage.experiment import Arm, Parts, batch_leakage
from recipes.classifier import ImageClassifier
from recipes.command import TRAINER, quiet_lightning, read_arguments
from recipes.images import FASHION_MNIST

EVERY_PRESET = {
    **TRAINER,
    "model.width": 16,
    "model.lr": 0.1,
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data.train_images": 1024,
        "data.val_images": 256,
        "model.width": 8,
        "trainer.max_epochs": 1,
    },
    "demo": {
        "trainer.max_epochs": 8,
    },
    "full": {
        "data_root": FASHION_MNIST,
        "data.train_images": 12_000,
        "data.val_images": 4000,
        "trainer.max_epochs": 40,
        "seeds": [0, 1, 2],
    },
}


def make_parser(preset: str) -> ArgumentParser:
    """All arguments of data, model and Trainer, with the preset's values as defaults."""
    parser = ArgumentParser(prog="python -m recipes.batch_leakage", description=RECIPE.shows)
    parser.add_argument("--config", action=ActionConfigFile, help="a file of settings, as --print_config prints them")
    parser.add_argument("--preset", type=Literal["smoke", "demo", "full"], default="demo")
    parser.add_argument("--data-root", type=Path | None, default=None, help=RECIPE.data)
    parser.add_argument("--out", type=Path | None, default=None, help="default: runs/batch_leakage/<preset>")
    parser.add_argument("--seeds", type=list[NonNegativeInt], default=[0], help="a model of each arm for each")
    parser.add_argument("--level", type=float, default=0.01, help="share of runs without leakage that may alarm")
    parser.add_class_arguments(LeakyData, "data")
    parser.add_class_arguments(ImageClassifier, "model")
    parser.add_class_arguments(L.Trainer, "trainer", skip={"logger"}, instantiate=False, fail_untyped=False)
    parser.link_arguments("data_root", "data.root")
    parser.link_arguments("data.num_channels", "model.in_channels", apply_on="instantiate")
    parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
    parser.set_defaults({**EVERY_PRESET, **PRESETS[preset]})
    return parser


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the command; returns the folder it wrote to."""
    parser, config, folder = read_arguments(RECIPE.name, PRESETS, make_parser, arguments)

    def make() -> Parts:
        made = parser.instantiate(config)
        return Parts(made.model, made.data, made.trainer.as_dict())

    def make_logger(job: str, name: str) -> Any:
        return report.wandb_logger(RECIPE.name, config.preset, job, name, folder, config.as_dict())

    def logger_of(arm: Arm, seed: int) -> Any:
        return make_logger(arm, f"{arm}, seed {seed}")

    print(f"{RECIPE.paper}: {RECIPE.shows}. On {report.machine()}.")
    started = time.perf_counter()
    results = batch_leakage(make, logger_of, folder / "monitor", seeds=config.seeds, level=config.level)
    verdicts, figures = claims(results), output.draw(results)
    training = (
        f"{config.model.network} of width {config.model.width}, SGD, batch "
        f"{config.data.classes * config.data.each}, learning rate {config.model.lr:g} on a cosine, "
        f"{config.trainer.max_epochs} epochs"
    )
    about = report.about(config.preset, training, started)
    paths = output.write(folder, results, verdicts, figures, about)
    report.conclude(make_logger("report", "report"), verdicts, figures, output.errors_table(results), paths)
    return folder


if __name__ == "__main__":
    quiet_lightning()
    main()
