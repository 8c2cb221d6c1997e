"""The command and its report.

    python -m recipes.shared_head --preset demo
    python -m recipes.shared_head --preset demo --rows [3,4] --ranks 2 --data.images_per_gpu 2
    python -m recipes.shared_head --preset demo --model.detector fcos
    python -m recipes.shared_head --preset full --seeds [0]
    python -m recipes.shared_head --config recipes/shared_head/coco.yaml --data-root ~/data/coco
    python -m recipes.shared_head --preset demo --print_config > mine.yaml

The figure in docs/assets is the demo's:
    cp runs/shared_head/demo/ap.png docs/assets/shared_head.png
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import PositiveInt
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from recipes import detection, figures
from recipes.average_precision import Measured
from recipes.run import Recipe, quiet_lightning, run
from recipes.shared_head import LISTING
from recipes.shared_head.claims import PAPER, judge, measured
from recipes.shared_head.detector import Detector
from recipes.shared_head.experiment import ROWS, Results, measure

DEFAULTS: dict[str, Any] = {
    **detection.TRAINER,
    "data.single_class": False,
    "data.object_sizes": (0.18, 0.7),  # for all levels except the coarsest
    "data.images_per_gpu": 4,
    # Nothing normalizes the outputs of the FPN. Large steps at the start make them explode.
    "trainer.gradient_clip_val": 1.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**detection.SMOKE, "rows": [3, 4], "precise_images": 8},
    "demo": {},
    "full": detection.FULL,
}
SECTIONS = """\
## Table 5

{table}

![Box AP by row, beside the paper's](ap.png)

Rows 1 and 2 are one training, so are 3 and 4, and 5 and 6. All three see the same images in the same order. Population
statistics are PreciseBN's, from training images and the trained weights.
"""


class SharedHead(Recipe[Results]):
    """Trains a RetinaNet three times, and evaluates each with shared and domain-specific population statistics."""

    name, listing = "shared_head", LISTING
    title = "BatchNorm in a head that is shared by feature levels"
    unit = detection.UNIT
    defaults, presets = DEFAULTS, PRESETS
    measure = staticmethod(measure)
    claims = staticmethod(judge)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--rows", type=list[PositiveInt], default=list(ROWS), help="of Table 5")
        parser.add_argument(
            "--ranks", type=PositiveInt, default=1, help="processes of a training, each on a GPU if any"
        )
        parser.add_argument("--precise_images", type=PositiveInt, default=400, help="training images for PreciseBN")
        detection.add_arguments(parser, Detector, skip_data=set(), skip_model={"num_classes"})

    def setting(self, results: Results, config: Namespace) -> str:
        weights = "ImageNet weights" if config.model.pretrained else "no weights"
        model = f"{config.model.detector} on {config.model.backbone} ({weights}), {results.levels} levels"
        steps = f"{results.steps:,} steps of {results.images_per_step} images, {results.ranks} rank(s)"
        return f"{results.data}; {model}; {steps}; {results.validation_images:,} validation images"

    def figures(self, results: Results) -> dict[str, Figure]:
        rows = {}
        for number, row in _rows(results).items():
            train, population, affine = ROWS[number]
            name = f"{number}: training {train}, population {population}"
            name += ", affine domain" if affine == "domain" else ""
            rows[name] = ([ap.all_images for ap in row.aps], row.paper)
        return {"ap": figures.ap_by_row(rows)}

    def table(self, results: Results) -> list[str]:
        """Table 5."""
        lines = ["| row | training | population | affine | paper | AP |", "|---" * 6 + "|"]
        for number, row in _rows(results).items():
            lines.append(f"| {number} | {' | '.join(ROWS[number])} | {row.paper} | {row.mean():.1f} |")
        return lines

    def sections(self, results: Results, config: Namespace) -> str:
        return SECTIONS.format(table="\n".join(self.table(results)))

    def as_json(self, results: Results) -> dict[str, Any]:
        return asdict(results)

    def log(self, logger: WandbLogger, results: Results) -> None:
        aps = {f"box_AP/row_{number}": row.mean() for number, row in _rows(results).items()}
        logger.experiment.summary.update(aps)


def _rows(results: Results) -> dict[int, Measured]:
    """Returns what was measured, in the order of the table."""
    return {number: measured(results, number) for number in PAPER if results.of(number)}


def main(arguments: Sequence[str] | None = None) -> Path:
    return run(SharedHead(), arguments)


if __name__ == "__main__":
    quiet_lightning()
    # Half of the table is about inconsistent choices.
    warnings.filterwarnings("ignore", message=".* are inconsistent")
    # An evaluation does not need the training's other callbacks.
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint")
    torch.set_num_threads(1)  # one core per rank; OpenMP's threads do not survive a fork
    main()
