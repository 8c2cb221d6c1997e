"""The paper's claims about R-CNN heads beside what was measured, judged by the rules of `recipes/claims.py`.

Of differences in box AP: over seeds, and over parts of the validation images.
"""

from collections.abc import Callable, Iterator, Sequence

from recipes.average_precision import Measured, interval_of, ordering, table
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
        ordering(claim, measured(results, a), measured(results, b), judge)
        for claim, a, b, judge in ORDERINGS
        if results.of(*a) and results.of(*b)
    ]
    return [*found, *leak_fades(results)]


def leak_fades(results: Results) -> Iterator[Claim]:
    """More images in the batch say less about each."""
    rows = [measured(results, (training, inference)) for training in ("bn-1", "bn-2") for inference in _BOTH]
    if not all(row.aps for row in rows):
        return
    one = table(rows[1].aps) - table(rows[0].aps)
    two = table(rows[3].aps) - table(rows[2].aps)
    gap = interval_of(one - two)
    yield Claim(
        "Mini-batch statistics gain more at 1 image a GPU than at 2",
        "+10.8 and +1.2",
        f"{one[:, 0].mean():+.1f} and {two[:, 0].mean():+.1f} (difference {gap})",
        larger(gap),
    )


_BOTH: tuple[Inference, Inference] = ("population", "mini-batch")


def measured(results: Results, cell: Cell) -> Measured:
    """Box AP of a row of the tables."""
    return Measured([row.box for row in results.of(*cell)], PAPER[cell][0])
