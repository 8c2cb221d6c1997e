"""The paper's claims about B, judged by the rules of `recipes/claims.py`."""

import math
from collections.abc import Callable, Iterator

import torch

from recipes.claims import MARGIN, Claim, Interval, Verdict, equal, interval, larger, mean_error, paired
from recipes.precise_batch_size.experiment import Results, Row

# Table 2, by normalization batch size of the training.
PAPER: dict[int, dict[str, float]] = {
    32: {"EMA": 23.7, "2": 28.8, "10": 24.0, "100": 23.5, "1000": 23.5, "N": 23.5},
    2: {"EMA": 35.5, "2": 34.4, "10": 32.3, "100": 32.0, "1000": 32.0, "N": 32.0},
}


def judge(results: Results) -> list[Claim]:
    """Judges every claim that these results can decide."""
    found: list[Claim] = []
    for nbs in results.trained:
        if nbs in PAPER:
            rows = results.of(nbs)
            found += small_is_wrong(rows, results.images)
            found += hundred_suffice(rows, results.images)
            found += errors_add_up(rows)
    found += b_is_free_of_training(results)
    found += small_training_batches_cost(results)
    return found


def small_is_wrong(rows: list[Row], n: int) -> Iterator[Claim]:
    for b in (2, 10):
        if b in rows[0].precise and b < n:
            yield _against_all(rows, b, n, f"B = {b} is worse than all images as one batch", larger)


def hundred_suffice(rows: list[Row], n: int) -> Iterator[Claim]:
    for b in (100, 1000):
        if b in rows[0].precise and b < n:
            yield _against_all(rows, b, n, f"B = {b:,} suffices (within {MARGIN:g} point of all images)", equal)


def errors_add_up(rows: list[Row]) -> Iterator[Claim]:
    if 2 not in rows[0].precise:
        return
    gaps = torch.cat([row.precise[2].gaps for row in rows])  # (seeds x draws, layers, 2)
    third = max(1, gaps.shape[1] // 3)
    first, last = gaps[:, :third].mean(1), gaps[:, -third:].mean(1)
    growth = interval(100 * (last - first)[:, 0], at_least=0.0 if len(gaps) > 1 else math.inf)  # one has no spread
    yield Claim(
        f"NBS {rows[0].nbs}: the error of small B grows with depth",
        "stated next to Table 2",
        f"B = 2, first and last third of the layers: mean gap {100 * first[:, 0].mean():.2f} and "
        f"{100 * last[:, 0].mean():.2f} % of sigma (difference {growth.mean:+.2f} ± {growth.half:.2f}), variance gap "
        f"{first[:, 1].mean():.3f} and {last[:, 1].mean():.3f}",
        larger(growth),
    )


def b_is_free_of_training(results: Results) -> Iterator[Claim]:
    rows = results.of(2)
    b = 100
    if not rows or b not in rows[0].precise:
        return
    gap = paired([(row.ema.wrong, row.precise[b].wrong) for row in rows])
    ema, precise = mean_error(row.ema.wrong for row in rows), mean_error(row.precise[b].wrong for row in rows)
    yield Claim(
        f"NBS 2: PreciseBN with B = {b} beats the EMA, which averages batches of 2",
        "EMA 35.5, B = 100 32.0",
        f"EMA {ema:.1f}, B = {b} {precise:.1f} (difference {gap})",
        larger(gap),
    )


def small_training_batches_cost(results: Results) -> Iterator[Claim]:
    small, usual = results.of(2), results.of(32)
    if not small or not usual:
        return
    n = results.images
    pairs = [(a.precise[n].wrong, b.precise[n].wrong) for a, b in zip(small, usual, strict=True)]
    gap = paired(pairs)
    yield Claim(
        "With exact statistics, the NBS 2 model is still worse than the NBS 32 model",
        "32.0 and 23.5",
        f"{mean_error(a for a, _ in pairs):.1f} and {mean_error(b for _, b in pairs):.1f} (difference {gap})",
        larger(gap),
    )


def _against_all(rows: list[Row], b: int, n: int, words: str, judge: Callable[[Interval], Verdict]) -> Claim:
    pairs = [(row.precise[b].wrong, row.precise[n].wrong) for row in rows]
    gap = paired(pairs)
    paper = PAPER[rows[0].nbs]
    at_b, at_n = mean_error(one for one, _ in pairs), mean_error(other for _, other in pairs)
    return Claim(
        f"NBS {rows[0].nbs}: {words}",
        f"{paper[str(b)]} at B = {b:,}, {paper['N']} at N",
        f"{at_b:.1f} at B = {b:,}, {at_n:.1f} at {n:,} (difference {gap})",
        judge(gap),
    )
