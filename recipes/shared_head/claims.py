"""The paper's claims about a shared head beside what was measured, judged by the rules of `recipes/claims.py`.

Of differences in box AP: over seeds, and over parts of the validation images.
"""

from collections.abc import Callable, Iterator, Sequence

from recipes.average_precision import Measured, interval_of, mean_ap, ordering, table
from recipes.claims import Claim, Interval, Verdict, equal, larger
from recipes.shared_head.experiment import Results

# Table 5: box AP.
PAPER = {1: 39.1, 2: 2.1, 3: 34.1, 4: 39.1, 5: 35.5, 6: 39.2}
# (claim, the row that ought to be larger or equal, the other, the rule)
ORDERINGS: Sequence[tuple[str, int, int, Callable[[Interval], Verdict]]] = (
    ("Statistics of all levels (row 1) are as good as each level's own (row 4)", 1, 4, equal),
    ("An affine of each level (row 6) is as good as a shared one (row 4)", 6, 4, equal),
    ("The straightforward code (row 3) is worse than statistics of all levels (row 1)", 1, 3, larger),
    ("The straightforward code (row 3) is worse than each level's own statistics (row 4)", 4, 3, larger),
    ("With an affine of each level, shared population statistics (row 5) are worse than own (row 6)", 6, 5, larger),
    ("An affine of each level makes the straightforward code better (row 5 against row 3)", 5, 3, larger),
    (
        "Normalizing levels together in training only (row 2) is worse than the straightforward code (row 3)",
        3,
        2,
        larger,
    ),
)


def claims(results: Results) -> list[Claim]:
    """Every claim that these results can speak to."""
    found = [
        ordering(claim, measured(results, a), measured(results, b), judge)
        for claim, a, b, judge in ORDERINGS
        if results.of(a) and results.of(b)
    ]
    return [*found, *collapse(results)]


def collapse(results: Results) -> Iterator[Claim]:
    """Row 2 is not merely worse: next to nothing is left."""
    all_levels, own = measured(results, 1), measured(results, 2)
    if not (all_levels.aps and own.aps):
        return
    gap = interval_of(table(all_levels.aps) / 2 - table(own.aps))
    yield Claim(
        "Normalizing levels together in training only (row 2) leaves less than half the AP of row 1",
        f"{PAPER[2]} of {PAPER[1]}",
        f"{mean_ap(own.aps):.1f} of {mean_ap(all_levels.aps):.1f} (half of it is larger by {gap})",
        larger(gap),
    )


def measured(results: Results, row: int) -> Measured:
    """Box AP of a row of the table."""
    return Measured([found.box for found in results.of(row)], PAPER[row])
