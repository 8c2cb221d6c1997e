"""The paper's claims about R-CNN heads beside what was measured, judged by the rules of `recipes/claims.py`.

Of differences in box AP: over seeds, and over parts of the validation images.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from recipes.claims import Claim, Interval, Verdict, equal, half_width, interval, larger
from recipes.roi_head_leakage.experiment import Inference, Results, Row

Cell = tuple[str, Inference]
# Tables 3 and 6: box and mask AP.
PAPER: dict[Cell, tuple[float, float]] = {
    ("bn-1", "population"): (30.7, 27.9),
    ("bn-1", "mini-batch"): (41.5, 37.0),
    ("bn-2", "population"): (40.1, 36.2),
    ("bn-2", "mini-batch"): (41.3, 37.0),
    ("shuffle-1", "population"): (41.7, 37.7),
    ("shuffle-2", "population"): (41.6, 37.6),
    ("sync", "population"): (41.7, 37.7),
    ("none", "population"): (41.1, 36.9),
    ("gn", "population"): (41.4, 37.7),
}
# (claim, the cell that ought to be larger or equal, the other, the rule)
ORDERINGS: Sequence[tuple[str, Cell, Cell, Callable[[Interval], Verdict]]] = (
    (
        "1 image a GPU: mini-batch statistics in evaluation beat the population's",
        ("bn-1", "mini-batch"),
        ("bn-1", "population"),
        larger,
    ),
    (
        "2 images a GPU: mini-batch statistics in evaluation beat the population's",
        ("bn-2", "mini-batch"),
        ("bn-2", "population"),
        larger,
    ),
    (
        "Population statistics: 2 images a GPU beat 1",
        ("bn-2", "population"),
        ("bn-1", "population"),
        larger,
    ),
    ("1 image a GPU: shuffling beats not shuffling", ("shuffle-1", "population"), ("bn-1", "population"), larger),
    ("2 images a GPU: shuffling beats not shuffling", ("shuffle-2", "population"), ("bn-2", "population"), larger),
    (
        "With shuffling, 1 image a GPU is as good as 2",
        ("shuffle-1", "population"),
        ("shuffle-2", "population"),
        equal,
    ),
    ("SyncBN beats per-GPU BN at 1 image", ("sync", "population"), ("bn-1", "population"), larger),
    ("Shuffling at 1 image is as good as SyncBN", ("shuffle-1", "population"), ("sync", "population"), equal),
    ("Per-GPU BN at 1 image is worse than no norm", ("none", "population"), ("bn-1", "population"), larger),
    ("SyncBN is as good as GN", ("sync", "population"), ("gn", "population"), equal),
)


def claims(results: Results) -> list[Claim]:
    """Every claim that these results can speak to."""
    found = [
        _ordering(claim, a, b, judge, results) for claim, a, b, judge in ORDERINGS if results.of(*a) and results.of(*b)
    ]
    return [*found, *leak_fades(results)]


def leak_fades(results: Results) -> Iterator[Claim]:
    """More images in the batch say less about each."""
    rows = [results.of(training, inference) for training in ("bn-1", "bn-2") for inference in _BOTH]
    if not all(rows):
        return
    one = _difference(rows[1], rows[0])
    two = _difference(rows[3], rows[2])
    gap = _interval(one - two)
    yield Claim(
        "Mini-batch statistics gain more at 1 image a GPU than at 2",
        "+10.8 and +1.2",
        f"{one[:, 0].mean():+.1f} and {two[:, 0].mean():+.1f} (difference {gap})",
        larger(gap),
    )


_BOTH: tuple[Inference, Inference] = ("population", "mini-batch")


def _ordering(claim: str, a: Cell, b: Cell, judge: Callable[[Interval], Verdict], results: Results) -> Claim:
    rows, others = results.of(*a), results.of(*b)
    gap = _interval(_difference(rows, others))
    return Claim(
        claim,
        f"{PAPER[a][0]} and {PAPER[b][0]}",
        f"{mean_ap(rows):.1f} and {mean_ap(others):.1f} (difference {gap})",
        judge(gap),
    )


def mean_ap(rows: Sequence[Row]) -> float:
    return sum(row.box.of_all for row in rows) / len(rows)


def _difference(rows: Sequence[Row], others: Sequence[Row]) -> Tensor:
    """(seeds, 1 + parts): of all images, and of each part."""
    return _table(rows) - _table(others)


def _table(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([[row.box.of_all, *row.box.of_parts] for row in rows], dtype=torch.float64)


def _interval(difference: Tensor) -> Interval:
    return interval(difference[:, 0], at_least=half_width(difference[:, 1:].mean(0)))
