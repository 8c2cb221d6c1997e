"""Average precision, its spread over parts of the images, and how two are compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_bn.plots.style import BATCHES, PRECISE, new_figure, styled
from recipes.claims import Claim, Interval, Verdict, half_width, interval

ONE_SEED = "1 seed, so that differences between two trainings may turn with another"
Found = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What was found in an image, and what there is."""


@dataclass(frozen=True)
class AP:
    """In percent, of all validation images, and of each of some equal parts of them."""

    of_all: float
    of_parts: list[float]


class Measured(NamedTuple):
    """A row of a table: box APs measured here, one a seed, and the paper's."""

    aps: Sequence[AP]
    paper: float


def average_precision(found: Sequence[Found], kind: Literal["bbox", "segm"]) -> float:
    """COCO's AP of these images, in percent."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_type=kind, backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    metric.update([one for one, _ in found], [target for _, target in found])
    return 100 * float(metric.compute()["map"])


def in_parts(found: Sequence[Found], kind: Literal["bbox", "segm"], parts: int) -> AP:
    """Of all images, and of every so-manieth."""
    return AP(average_precision(found, kind), [average_precision(found[i::parts], kind) for i in range(parts)])


def mean_ap(aps: Sequence[AP]) -> float:
    """Of several seeds."""
    return sum(ap.of_all for ap in aps) / len(aps)


def table(aps: Sequence[AP]) -> Tensor:
    """(seeds, 1 + parts): of all images, and of each part."""
    return torch.tensor([[ap.of_all, *ap.of_parts] for ap in aps], dtype=torch.float64)


def interval_of(difference: Tensor) -> Interval:
    """Of a difference of tables: over seeds, and no narrower than over parts of the images."""
    return interval(difference[:, 0], at_least=half_width(difference[:, 1:].mean(0)))


def ordering(claim: str, row: Measured, other: Measured, judge: Callable[[Interval], Verdict]) -> Claim:
    """A claim about which of two rows is the larger, or that they are equal."""
    gap = interval_of(table(row.aps) - table(other.aps))
    return Claim(
        claim,
        f"{row.paper} and {other.paper}",
        f"{mean_ap(row.aps):.1f} and {mean_ap(other.aps):.1f} (difference {gap})",
        judge(gap),
    )


@styled
def beside_the_papers(rows: Mapping[str, Measured]) -> Figure:
    """Box AP of every row, of each seed, with a bar at their mean, and the paper's."""
    figure = new_figure(8.0, 1.2 + 0.34 * len(rows))
    ours, papers = figure.subplots(1, 2, sharey=True)
    for y, row in enumerate(rows.values()):
        seeds = [ap.of_all for ap in row.aps]
        ours.plot(seeds, [y] * len(seeds), "o", color=PRECISE, alpha=0.5)
        if len(seeds) > 1:
            ours.plot(mean_ap(row.aps), y, "|", color=PRECISE, markersize=14)
        papers.plot(row.paper, y, "s", color=BATCHES)
    ours.set_yticks(range(len(rows)), list(rows))
    ours.invert_yaxis()
    ours.set_title("here")
    papers.set_title("paper")
    for axes in (ours, papers):
        axes.set_xlim(left=0)
        axes.set_xlabel("box AP (%)")
    return figure
