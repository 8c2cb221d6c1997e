"""The paper's claims about R-CNN heads judged by the rules of `recipes/claims.py`.

Intervals are of differences in box AP, over seeds and over parts of the validation images.
"""

from collections.abc import Callable, Iterator, Sequence

from recipes.average_precision import Measured, interval_of, ordering
from recipes.claims import Claim, Interval, Verdict, equal, larger
from recipes.roi_head_leakage.experiment import Inference, Results

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
# (claim, the cell that should be larger or equal, the other, the rule)
ORDERINGS: Sequence[tuple[str, Cell, Cell, Callable[[Interval], Verdict]]] = (
    (
        "1 image per GPU: mini-batch statistics in evaluation beat the population's",
        ("bn-1", "mini-batch"),
        ("bn-1", "population"),
        larger,
    ),
    (
        "2 images per GPU: mini-batch statistics in evaluation beat the population's",
        ("bn-2", "mini-batch"),
        ("bn-2", "population"),
        larger,
    ),
    (
        "Population statistics: 2 images per GPU beat 1",
        ("bn-2", "population"),
        ("bn-1", "population"),
        larger,
    ),
    ("1 image per GPU: shuffling beats not shuffling", ("shuffle-1", "population"), ("bn-1", "population"), larger),
    ("2 images per GPU: shuffling beats not shuffling", ("shuffle-2", "population"), ("bn-2", "population"), larger),
    (
        "With shuffling, 1 image per GPU is as good as 2",
        ("shuffle-1", "population"),
        ("shuffle-2", "population"),
        equal,
    ),
    ("SyncBN beats per-GPU BN at 1 image", ("sync", "population"), ("bn-1", "population"), larger),
    ("Shuffling at 1 image is as good as SyncBN", ("shuffle-1", "population"), ("sync", "population"), equal),
    ("Per-GPU BN at 1 image is worse than no norm", ("none", "population"), ("bn-1", "population"), larger),
    ("SyncBN is as good as GN", ("sync", "population"), ("gn", "population"), equal),
)


def judge(results: Results) -> list[Claim]:
    """Judges every claim that these results can decide."""
    found = [
        ordering(claim, measured(results, a), measured(results, b), rule)
        for claim, a, b, rule in ORDERINGS
        if results.of(*a) and results.of(*b)
    ]
    return [*found, *leak_fades(results)]


def leak_fades(results: Results) -> Iterator[Claim]:
    """With more images in the batch, its statistics reveal less about each."""
    both: tuple[Inference, Inference] = ("population", "mini-batch")
    rows = [measured(results, (training, inference)) for training in ("bn-1", "bn-2") for inference in both]
    if not all(row.aps for row in rows):
        return
    one = rows[1].as_tensor() - rows[0].as_tensor()
    two = rows[3].as_tensor() - rows[2].as_tensor()
    gap = interval_of(one - two)
    yield Claim(
        "Mini-batch statistics gain more at 1 image per GPU than at 2",
        "+10.8 and +1.2",
        f"{one[:, 0].mean():+.1f} and {two[:, 0].mean():+.1f} (difference {gap})",
        larger(gap),
    )


def measured(results: Results, cell: Cell) -> Measured:
    """Returns the box AP of a row of the tables."""
    return Measured([row.box for row in results.of(*cell)], PAPER[cell][0])
