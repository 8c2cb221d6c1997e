"""The paper's claims about a shared head judged by the rules of `recipes/claims.py`.

Intervals are of differences in box AP, over seeds and over parts of the validation images.
"""

from collections.abc import Callable, Iterator, Sequence

from recipes.average_precision import Measured, interval_of, ordering
from recipes.claims import Claim, Interval, Verdict, equal, larger
from recipes.shared_head.experiment import Results

# Table 5: box AP.
PAPER = {1: 39.1, 2: 2.1, 3: 34.1, 4: 39.1, 5: 35.5, 6: 39.2}
# (claim, the row that should be larger or equal, the other, the rule)
ORDERINGS: Sequence[tuple[str, int, int, Callable[[Interval], Verdict]]] = (
    ("Statistics of all levels (row 1) are as good as separate ones (row 4)", 1, 4, equal),
    ("An affine of each level (row 6) is as good as a shared one (row 4)", 6, 4, equal),
    ("The straightforward code (row 3) is worse than statistics of all levels (row 1)", 1, 3, larger),
    ("The straightforward code (row 3) is worse than separate statistics (row 4)", 4, 3, larger),
    (
        "With an affine of each level, shared population statistics (row 5) are worse than separate ones (row 6)",
        6,
        5,
        larger,
    ),
    ("An affine of each level makes the straightforward code better (row 5 against row 3)", 5, 3, larger),
    (
        "Normalizing levels together in training only (row 2) is worse than the straightforward code (row 3)",
        3,
        2,
        larger,
    ),
)


def judge(results: Results) -> list[Claim]:
    """Judges every claim that these results can decide."""
    found = [
        ordering(claim, measured(results, a), measured(results, b), rule)
        for claim, a, b, rule in ORDERINGS
        if results.of(a) and results.of(b)
    ]
    return [*found, *collapse(results)]


def collapse(results: Results) -> Iterator[Claim]:
    """In the paper, row 2 has hardly any AP."""
    consistent, inconsistent = measured(results, 1), measured(results, 2)
    if not (consistent.aps and inconsistent.aps):
        return
    gap = interval_of(consistent.as_tensor() / 2 - inconsistent.as_tensor())
    yield Claim(
        "Normalizing levels together in training only (row 2) leaves less than half the AP of row 1",
        f"{PAPER[2]} of {PAPER[1]}",
        f"{inconsistent.mean():.1f} of {consistent.mean():.1f} (half of it is larger by {gap})",
        larger(gap),
    )


def measured(results: Results, row: int) -> Measured:
    """Returns the box AP of a row of the table."""
    return Measured([found.box for found in results.of(row)], PAPER[row])
