"""Compares claims of the paper with measurements, by fixed rules.

Both kinds of claim are judged by the 95 % interval of a difference A - B:

- `larger` holds if the interval lies above zero, and does not hold if it lies below.
- `equal` holds if the interval lies within one point of error, and does not hold if it lies outside.

Otherwise the verdict is "within noise". The half-width of the interval is the larger of two: over the repetitions
(seeds, draws or layers), and over the validation images, paired if both errors are known image by image.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["holds", "does not hold", "within noise"]
MARGIN = 1.0  # points of validation error that count as equal
# Student's t by degrees of freedom, the last for more.
STUDENT_95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Claim:
    """A claim, the paper's numbers, the measured ones, and the verdict."""

    claim: str
    paper: str
    measured: str
    verdict: Verdict


@dataclass(frozen=True)
class Interval:
    """A mean with the half-width of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}"


def larger(difference: Interval) -> Verdict:
    if difference.mean - difference.half > 0:
        return "holds"
    return "does not hold" if difference.mean + difference.half < 0 else "within noise"


def equal(difference: Interval) -> Verdict:
    if abs(difference.mean) + difference.half < MARGIN:
        return "holds"
    return "does not hold" if abs(difference.mean) - difference.half > MARGIN else "within noise"


def half_width(values: Sequence[float] | Tensor) -> float:
    """Half-width of the 95 % interval of the mean of repeated measurements; 0 for a single one."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return 0.0
    degrees = len(values) - 1
    t = 1.96 if degrees > 100 else STUDENT_95[min(degrees, len(STUDENT_95) - 1)]
    return t * float(values.std()) / math.sqrt(len(values))


def interval(repeated: Sequence[float] | Tensor, *, at_least: float) -> Interval:
    """Interval of repeated measurements, with a half-width of at least `at_least`."""
    values = torch.as_tensor(repeated, dtype=torch.float64)
    return Interval(float(values.mean()), max(half_width(values), at_least))


def paired(pairs: Sequence[tuple[Tensor, Tensor]]) -> Interval:
    """Interval of the difference in error of A and B, each (draws, images), one pair per seed."""
    # The only draw of one is compared with every draw of the other.
    per_seed = [100 * (a.mean(1) - b.mean(1)) for a, b in pairs]
    repeated = torch.stack([d.mean() for d in per_seed]) if len(pairs) > 1 else per_seed[0]
    per_image = torch.stack([100 * (a.mean(0) - b.mean(0)) for a, b in pairs]).mean(0)
    return interval(repeated, at_least=half_width(per_image))


def unpaired(a: float, b: float, images: int) -> float:
    """Half-width of the difference of two errors (%), each measured on other images."""
    return 1.96 * math.sqrt(sum(error * (100 - error) for error in (a, b)) / images)


def mean_error(wrong: Iterable[Tensor]) -> float:
    """Error in percent, averaged over seeds; each of `wrong` is (draws, images)."""
    return 100 * float(torch.stack([w.mean() for w in wrong]).mean())


def claims_table(claims: Sequence[Claim]) -> list[str]:
    lines = ["| claim | paper | measured here | verdict |", "|---|---|---|---|"]
    return lines + [f"| {c.claim} | {c.paper} | {c.measured} | **{c.verdict}** |" for c in claims]
