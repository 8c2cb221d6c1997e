"""The command, with LightningCLI's conventions for every setting.

    python -m recipes.shared_head --preset demo
    python -m recipes.shared_head --preset demo --rows [3,4] --ranks 2 --data.images_per_gpu 2
    python -m recipes.shared_head --preset demo --model.detector fcos
    python -m recipes.shared_head --preset full --seeds [0]
    python -m recipes.shared_head --config recipes/shared_head/coco.yaml --data-root ~/data/coco
    python -m recipes.shared_head --preset demo --print_config > mine.yaml

The picture in docs/assets is the demo's:
    cp runs/shared_head/demo/ap.png docs/assets/shared_head.png
"""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import NonNegativeInt, PositiveInt

from recipes import report
from recipes.command import quiet_lightning, read_arguments
from recipes.detection import TRAINER, Parts
from recipes.scenes import STAMPS, SceneData
from recipes.shared_head import RECIPE, output
from recipes.shared_head.claims import claims
from recipes.shared_head.detector import Detector
from recipes.shared_head.experiment import ROWS, shared_head

EVERY_PRESET = {
    **{name: value for name, value in TRAINER.items() if name != "trainer.enable_checkpointing"},
    "data.single_class": False,
    "data.object_sizes": (0.18, 0.7),  # of every level but the coarsest
    "data.images_per_gpu": 4,
    # Nothing normalizes the FPN's outputs: steps that are too large at the start blow them up, and they learn no more.
    "trainer.gradient_clip_val": 1.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data.train_images": 16,
        "data.val_images": 6,
        "model.pretrained": False,
        "model.warmup_steps": 2,
        "rows": [3, 4],
        "precise_images": 8,
        "parts": 2,
    },
    "demo": {},
    "full": {
        "data.cut_outs": STAMPS,
        "data.train_images": 16_000,
        "data.val_images": 500,
        "data.size": 160,
        "model.image_size": 160,
        "model.max_image_size": 160,
        "seeds": [0, 1, 2],
    },
}


def make_parser(preset: str) -> ArgumentParser:
    """All arguments of data, model and Trainer, with the preset's values as defaults."""
    parser = ArgumentParser(prog="python -m recipes.shared_head", description=RECIPE.shows)
    parser.add_argument("--config", action=ActionConfigFile, help="a file of settings, as --print_config prints them")
    parser.add_argument("--preset", type=Literal["smoke", "demo", "full"], default="demo")
    parser.add_argument("--data-root", type=Path | None, default=None, help=RECIPE.data)
    parser.add_argument("--out", type=Path | None, default=None, help="default: runs/shared_head/<preset>")
    parser.add_argument("--seeds", type=list[NonNegativeInt], default=[0], help="three trainings for each")
    parser.add_argument("--rows", type=list[PositiveInt], default=list(ROWS), help="of Table 5")
    parser.add_argument("--ranks", type=PositiveInt, default=1, help="processes of a training, each on a GPU if any")
    parser.add_argument("--images_per_step", type=PositiveInt, default=4, help="images of a step, on all ranks")
    parser.add_argument("--precise_images", type=PositiveInt, default=400, help="training images that PreciseBN takes")
    parser.add_argument("--parts", type=PositiveInt, default=5, help="parts of the validation images, for the spread")
    parser.add_class_arguments(SceneData, "data", instantiate=False)
    parser.add_class_arguments(Detector, "model", skip={"num_classes"}, instantiate=False)
    skip = {"logger", "devices", "strategy", "callbacks", "accumulate_grad_batches", "limit_val_batches"}
    skip |= {"enable_checkpointing"}  # a training is evaluated from its checkpoint
    parser.add_class_arguments(L.Trainer, "trainer", skip=skip, instantiate=False, fail_untyped=False)
    parser.link_arguments("data_root", "data.root")
    parser.set_defaults({**EVERY_PRESET, **PRESETS[preset]})
    return parser


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the command; returns the folder it wrote to."""
    _, config, folder = read_arguments(RECIPE.name, PRESETS, make_parser, arguments)

    def make() -> Parts[Detector]:
        data = SceneData(**config.data.as_dict())
        return Parts(Detector(data.num_classes, **config.model.as_dict()), data, config.trainer.as_dict())

    print(f"{RECIPE.paper}: {RECIPE.shows}. On {report.machine()}.")
    started = time.perf_counter()
    results = shared_head(
        make,
        seeds=config.seeds,
        rows=config.rows,
        ranks=config.ranks,
        images_per_step=config.images_per_step,
        precise_images=config.precise_images,
        parts=config.parts,
    )
    verdicts, figures = claims(results), output.draw(results)
    training = (
        f"{config.model.detector} on {config.model.backbone} "
        f"({'ImageNet weights, ' if config.model.pretrained else 'no weights, '}FrozenBatchNorm) with an FPN"
    )
    about = report.about(config.preset, training, started)
    paths = output.write(folder, results, verdicts, figures, about)
    logger = report.wandb_logger(RECIPE.name, config.preset, "report", "report", folder, config.as_dict())
    logger.experiment.summary.update(output.summary(results))
    report.conclude(logger, verdicts, figures, output.ap_table(results), paths)
    return folder


if __name__ == "__main__":
    quiet_lightning()
    # Half of the table is about inconsistent choices, and the report has the paper's numbers beside its own.
    warnings.filterwarnings("ignore", message=".* are inconsistent")
    # An evaluation needs nothing of the training's other callbacks.
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint")
    torch.set_num_threads(1)  # a rank on a core; OpenMP's threads would not be there after a fork
    main()
