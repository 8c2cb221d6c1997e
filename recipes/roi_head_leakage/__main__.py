"""The command, with LightningCLI's conventions for every setting.

    python -m recipes.roi_head_leakage --preset demo
    python -m recipes.roi_head_leakage --preset demo --trainings [bn-1,shuffle-1] --ranks 4 --data.single_class false
    python -m recipes.roi_head_leakage --preset full --seeds [0]
    python -m recipes.roi_head_leakage --config recipes/roi_head_leakage/coco.yaml --data-root ~/data/coco
    python -m recipes.roi_head_leakage --preset demo --print_config > mine.yaml

The picture in docs/assets is the demo's:
    cp runs/roi_head_leakage/demo/ap.png docs/assets/roi_head_leakage.png
"""

import time
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
from recipes.roi_head_leakage import RECIPE, output
from recipes.roi_head_leakage.claims import claims
from recipes.roi_head_leakage.detector import Detector, Norm
from recipes.roi_head_leakage.experiment import TRAININGS, roi_head_leakage
from recipes.scenes import STAMPS, SceneData

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data.train_images": 16,
        "data.val_images": 6,
        "model.pretrained": False,
        "model.warmup_steps": 2,
        "trainings": ["bn-1", "shuffle-1"],
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
        "model.masks": True,
        "seeds": [0, 1, 2],
    },
}


def make_parser(preset: str) -> ArgumentParser:
    """All arguments of data, model and Trainer, with the preset's values as defaults."""
    parser = ArgumentParser(prog="python -m recipes.roi_head_leakage", description=RECIPE.shows)
    parser.add_argument("--config", action=ActionConfigFile, help="a file of settings, as --print_config prints them")
    parser.add_argument("--preset", type=Literal["smoke", "demo", "full"], default="demo")
    parser.add_argument("--data-root", type=Path | None, default=None, help=RECIPE.data)
    parser.add_argument("--out", type=Path | None, default=None, help="default: runs/roi_head_leakage/<preset>")
    parser.add_argument("--seeds", type=list[NonNegativeInt], default=[0], help="a training of each kind for each")
    parser.add_argument("--trainings", type=list[str], default=list(TRAININGS), help="of " + ", ".join(TRAININGS))
    parser.add_argument("--ranks", type=PositiveInt, default=2, help="processes of a training, each on a GPU if any")
    parser.add_argument("--images_per_step", type=PositiveInt, default=4, help="images of a step, on all ranks")
    parser.add_argument("--parts", type=PositiveInt, default=5, help="parts of the validation images, for the spread")
    parser.add_class_arguments(SceneData, "data", skip={"images_per_gpu"}, instantiate=False)
    parser.add_class_arguments(Detector, "model", skip={"num_classes", "head_norm"}, instantiate=False)
    skip = {"logger", "devices", "strategy", "callbacks", "accumulate_grad_batches", "limit_val_batches"}
    parser.add_class_arguments(L.Trainer, "trainer", skip=skip, instantiate=False, fail_untyped=False)
    parser.link_arguments("data_root", "data.root")
    parser.set_defaults({**TRAINER, **PRESETS[preset]})
    return parser


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the command; returns the folder it wrote to."""
    _, config, folder = read_arguments(RECIPE.name, PRESETS, make_parser, arguments)

    def make(norm: Norm, images_per_gpu: int) -> Parts[Detector]:
        data = SceneData(**config.data.as_dict(), images_per_gpu=images_per_gpu)
        model = Detector(data.num_classes, norm, **config.model.as_dict())
        return Parts(model, data, config.trainer.as_dict())

    print(f"{RECIPE.paper}: {RECIPE.shows}. On {report.machine()}.")
    started = time.perf_counter()
    results = roi_head_leakage(
        make,
        seeds=config.seeds,
        trainings=config.trainings,
        ranks=config.ranks,
        images_per_step=config.images_per_step,
        parts=config.parts,
    )
    verdicts, figures = claims(results), output.draw(results)
    training = (
        f"{'Mask' if config.model.masks else 'Faster'} R-CNN on {config.model.backbone} "
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
    torch.set_num_threads(1)  # a rank on a core; OpenMP's threads would not be there after a fork
    main()
