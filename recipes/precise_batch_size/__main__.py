"""The command, with LightningCLI's conventions for every setting.

    python -m recipes.precise_batch_size --preset demo
    python -m recipes.precise_batch_size --preset demo --batch_sizes [2,4,8,100] --tolerances [0.05,0.01]
    python -m recipes.precise_batch_size --preset full --data-root ~/data/cifar-10-batches-py --data.shift 4
    python -m recipes.precise_batch_size --preset demo --print_config > mine.yaml
    python -m recipes.precise_batch_size --config mine.yaml

The pictures in docs/assets are the demo's:
    for name in batch_size depth; do cp runs/precise_batch_size/demo/$name.png docs/assets/precise_$name.png; done
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.loggers import Logger

from recipes import report
from recipes.classifier import ImageClassifier
from recipes.command import TRAINER, quiet_lightning, read_arguments
from recipes.images import FASHION_MNIST, ImageData
from recipes.precise_batch_size import RECIPE, output
from recipes.precise_batch_size.claims import claims
from recipes.precise_batch_size.experiment import Parts, precise_batch_size
from recipes.tolerance import TOLERANCES

EVERY_PRESET = {
    **TRAINER,
    "data.batch_size": 32,
    "model.network": "plain20",  # with shortcuts the errors hardly add up over so few layers
    "model.width": 8,
    "model.lr": 0.1,
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data.train_images": 600,
        "data.val_images": 200,
        "trainer.max_epochs": 1,
        "images": 200,
        "batch_sizes": [2, 100],
        "draws": 2,
    },
    "demo": {
        "trainer.max_epochs": 4,
        "images": 2000,
        "batch_sizes": [2, 10, 100, 1000],
        "draws": 3,
    },
    "full": {
        "data_root": FASHION_MNIST,
        "data.train_images": 30_000,
        "trainer.max_epochs": 3,
        "seeds": [0, 1, 2],
        "images": 20_000,
        "batch_sizes": [2, 10, 100, 1000],
        "draws": 2,
        "tolerances": list(TOLERANCES),
    },
}


def make_parser(preset: str) -> ArgumentParser:
    """All arguments of data, model and Trainer, with the preset's values as defaults."""
    parser = ArgumentParser(prog="python -m recipes.precise_batch_size", description=RECIPE.shows)
    parser.add_argument("--config", action=ActionConfigFile, help="a file of settings, as --print_config prints them")
    parser.add_argument("--preset", type=Literal["smoke", "demo", "full"], default="demo")
    parser.add_argument("--data-root", type=Path | None, default=None, help=RECIPE.data)
    parser.add_argument("--out", type=Path | None, default=None, help="default: runs/precise_batch_size/<preset>")
    parser.add_argument("--seeds", type=list[NonNegativeInt], default=[0], help="a model of each kind for each")
    parser.add_argument("--nbs", type=list[PositiveInt], default=[32, 2], help="images normalized together in training")
    parser.add_argument("--batch_sizes", type=list[PositiveInt], default=[2, 10, 100, 1000], help="the B of Table 2")
    parser.add_argument("--images", type=PositiveInt, default=2000, help="training images of every estimate")
    parser.add_argument("--draws", type=PositiveInt, default=3, help="draws of so many images, for the spread")
    parser.add_argument("--tolerances", type=list[float], default=[], help="see where precise_bn(tolerance=) stops")
    parser.add_class_arguments(ImageData, "data")
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

    def logger_of(nbs: int, seed: int) -> Logger:
        logger: Logger = make_logger(f"NBS {nbs}", f"NBS {nbs}, seed {seed}")
        return logger

    print(f"{RECIPE.paper}: {RECIPE.shows}. On {report.machine()}.")
    started = time.perf_counter()
    results = precise_batch_size(
        make,
        logger_of,
        seeds=config.seeds,
        nbs=config.nbs,
        batch_sizes=config.batch_sizes,
        images=config.images,
        draws=config.draws,
        tolerances=config.tolerances,
    )
    verdicts, figures = claims(results), output.draw(results)
    training = (
        f"{config.model.network} of width {config.model.width}, SGD, batch {config.data.batch_size:,}, "
        f"learning rate {config.model.lr:g} on a cosine, {config.trainer.max_epochs} epochs"
    )
    about = report.about(config.preset, training, started)
    paths = output.write(folder, results, verdicts, figures, about)
    report.conclude(make_logger("report", "report"), verdicts, figures, output.errors_table(results), paths)
    return folder


if __name__ == "__main__":
    quiet_lightning()
    main()
