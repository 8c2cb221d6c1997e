"""Average precision (AP), its spread over parts of the images, and claims about two of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recipes.claims import Claim, Interval, Verdict, half_width, interval

Detections = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Predictions and targets of an image."""


@dataclass(frozen=True)
class AP:
    """AP in percent, of all validation images and of equal parts of them."""

    all_images: float
    by_part: list[float]


class Measured(NamedTuple):
    """A row of a table: box AP by seed, and the paper's."""

    aps: Sequence[AP]
    paper: float

    def mean(self) -> float:
        return sum(ap.all_images for ap in self.aps) / len(self.aps)

    def as_tensor(self) -> Tensor:
        """(seeds, 1 + parts): AP of all images, then of each part."""
        return torch.tensor([[ap.all_images, *ap.by_part] for ap in self.aps], dtype=torch.float64)


def average_precision(detections: Sequence[Detections], kind: Literal["bbox", "segm"]) -> float:
    """COCO's AP of these images, in percent."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_type=kind, backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    metric.update([predicted for predicted, _ in detections], [target for _, target in detections])
    return 100 * float(metric.compute()["map"])


def ap_by_part(detections: Sequence[Detections], kind: Literal["bbox", "segm"], parts: int) -> AP:
    """AP of all images and of `parts` interleaved subsets."""
    by_part = [average_precision(detections[part::parts], kind) for part in range(parts)]
    return AP(average_precision(detections, kind), by_part)


def interval_of(difference: Tensor) -> Interval:
    """Interval of a difference of `Measured.as_tensor()` over seeds, at least as wide as over parts of the images."""
    return interval(difference[:, 0], at_least=half_width(difference[:, 1:].mean(0)))


def ordering(claim: str, row: Measured, other: Measured, judge: Callable[[Interval], Verdict]) -> Claim:
    """Judges a claim that `row` is larger than `other`, or equal."""
    gap = interval_of(row.as_tensor() - other.as_tensor())
    measured = f"{row.mean():.1f} and {other.mean():.1f} (difference {gap})"
    return Claim(claim, f"{row.paper} and {other.paper}", measured, judge(gap))
