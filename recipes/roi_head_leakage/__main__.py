"""The command and its report.

    python -m recipes.roi_head_leakage --preset demo
    python -m recipes.roi_head_leakage --preset demo --trainings [bn-1,shuffle-1] --ranks 4 --data.single_class false
    python -m recipes.roi_head_leakage --preset full --seeds [0]
    python -m recipes.roi_head_leakage --config recipes/roi_head_leakage/coco.yaml --data-root ~/data/coco
    python -m recipes.roi_head_leakage --preset demo --print_config > mine.yaml

The figure in docs/assets is the demo's:
    cp runs/roi_head_leakage/demo/ap.png docs/assets/roi_head_leakage.png
"""

from collections.abc import Iterator, Sequence
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
from recipes.roi_head_leakage import LISTING
from recipes.roi_head_leakage.claims import PAPER, Cell, judge, measured
from recipes.roi_head_leakage.detector import Detector
from recipes.roi_head_leakage.experiment import TRAININGS, Results, measure
from recipes.run import Recipe, quiet_lightning, run

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**detection.SMOKE, "trainings": ["bn-1", "shuffle-1"]},
    "demo": {},
    "full": {**detection.FULL, "model.masks": True},
}
SECTIONS = """\
## Tables 3 and 6

{table}

![Box AP by row, beside the paper's](ap.png)

All trainings of a seed see the same images in the same order and take the same steps. With one image per rank,
gradients are accumulated. Mini-batch statistics are those of the evaluated image. The paper shuffled among more GPUs
than the {ranks} ranks here.
"""


class RoIHeadLeakage(Recipe[Results]):
    """Trains an R-CNN with each kind of head, and evaluates it with population and mini-batch statistics."""

    name, listing = "roi_head_leakage", LISTING
    title = "BatchNorm in an R-CNN head"
    unit = detection.UNIT
    defaults, presets = detection.TRAINER, PRESETS
    measure = staticmethod(measure)
    claims = staticmethod(judge)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--trainings", type=list[str], default=list(TRAININGS), help="of " + ", ".join(TRAININGS))
        parser.add_argument(
            "--ranks", type=PositiveInt, default=2, help="processes of a training, each on a GPU if any"
        )
        skip_model = {"num_classes", "head_norm"}
        detection.add_arguments(parser, Detector, skip_data={"images_per_gpu"}, skip_model=skip_model)

    def setting(self, results: Results, config: Namespace) -> str:
        weights = "ImageNet weights" if config.model.pretrained else "no weights"
        model = f"{'Mask' if config.model.masks else 'Faster'} R-CNN on {config.model.backbone} ({weights})"
        steps = f"{results.steps:,} steps of {results.images_per_step} images on {results.ranks} ranks"
        return f"{results.data}; {model}; {steps}; {results.validation_images:,} validation images"

    def figures(self, results: Results) -> dict[str, Figure]:
        rows = {}
        for (key, inference), row in _cells(results):
            training = TRAININGS[key]
            statistics = f", {inference}" if training.norm == "BN" else ""
            name = f"{training.name}, {training.images_per_gpu} per GPU{statistics}"
            rows[name] = ([ap.all_images for ap in row.aps], row.paper)
        return {"ap": figures.ap_by_row(rows)}

    def table(self, results: Results) -> list[str]:
        """Tables 3 and 6."""
        lines = ["| head norm | images per GPU | inference | paper | box AP | mask AP |", "|---" * 6 + "|"]
        for (key, inference), row in _cells(results):
            training = TRAININGS[key]
            statistics = inference if training.norm == "BN" else "-"
            paper = "{} / {}".format(*PAPER[key, inference])
            masks = Measured([r.mask for r in results.of(key, inference) if r.mask is not None], 0.0)
            mask = f"{masks.mean():.1f}" if masks.aps else "-"
            cells = [training.name, str(training.images_per_gpu), statistics, paper, f"{row.mean():.1f}", mask]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def sections(self, results: Results, config: Namespace) -> str:
        return SECTIONS.format(table="\n".join(self.table(results)), ranks=results.ranks)

    def as_json(self, results: Results) -> dict[str, Any]:
        return asdict(results)

    def log(self, logger: WandbLogger, results: Results) -> None:
        aps = {f"box_AP/{key}/{inference}": row.mean() for (key, inference), row in _cells(results)}
        logger.experiment.summary.update(aps)


def _cells(results: Results) -> Iterator[tuple[Cell, Measured]]:
    """Yields what was measured, in the order of the tables."""
    for cell in PAPER:
        if results.of(*cell):
            yield cell, measured(results, cell)


def main(arguments: Sequence[str] | None = None) -> Path:
    return run(RoIHeadLeakage(), arguments)


if __name__ == "__main__":
    quiet_lightning()
    torch.set_num_threads(1)  # one core per rank; OpenMP's threads do not survive a fork
    main()
