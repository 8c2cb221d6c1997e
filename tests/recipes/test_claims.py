"""The verdicts of all reports are decided by the numbers, in all three directions."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from recipes.average_precision import AP, Measured, ordering
from recipes.batch_leakage import claims as leakage
from recipes.batch_leakage.experiment import Results as LeakageResults
from recipes.batch_leakage.experiment import Training as LeakageTraining
from recipes.claims import Claim, Interval, equal, half_width, larger
from recipes.ema_vs_precise import claims as ema_vs_precise
from recipes.ema_vs_precise.experiment import Cloud, Results, Sweep, Training
from recipes.precise_batch_size import claims as batch_size
from recipes.precise_batch_size.experiment import Estimate
from recipes.precise_batch_size.experiment import Results as BatchSizeResults
from recipes.precise_batch_size.experiment import Row as BatchSizeRow
from recipes.roi_head_leakage import claims as roi_head
from recipes.roi_head_leakage.experiment import TRAININGS as ROI_TRAININGS
from recipes.roi_head_leakage.experiment import Results as RoIHeadResults
from recipes.roi_head_leakage.experiment import Row as RoIHeadRow
from recipes.shared_head import claims as shared_head
from recipes.shared_head.experiment import ROWS, TRAININGS
from recipes.shared_head.experiment import Results as SharedHeadResults
from recipes.shared_head.experiment import Row as SharedHeadRow

IMAGES = 10_000


def wrong(error: float, draws: int = 1) -> torch.Tensor:
    """`error` percent of the images wrong, the same ones in every draw."""
    images = torch.zeros(draws, IMAGES, dtype=torch.float64)
    images[:, : round(error / 100 * IMAGES)] = 1
    return images


def curve(arm: Any, seed: int, errors: list[float], weights: str = "same") -> Training:
    epochs = [float(epoch + 1) for epoch in range(len(errors))]
    return Training(arm, seed, epochs, errors, [weights] * len(errors), [], [10, 20, 30, 40])


def of_ema(
    ema: Iterable[float] = (90, 60, 30, 4),
    precise: Iterable[float] = (40, 20, 10, 4),
    at_10: float = 20,
    at_1000: float = 10,
    weights: str = "same",
    early_ema: float = 5.0,
    more: Iterable[Training] = (),
) -> list[Claim]:
    ema, precise, sweeps = list(ema), list(precise), []
    for epoch, ema_error, population in ((1.0, ema[0], precise[0]), (4.0, ema[-1], precise[-1])):
        errors = {10: at_10 + population - 10, 100: population + 1, 1000: at_1000 + population - 10, 4000: population}
        precise_wrong = {n: wrong(error, draws=1 if n == 4000 else 3) for n, error in errors.items()}
        sweeps.append(Sweep(0, epoch, wrong(ema_error), precise_wrong))
    cloud = Cloud(
        channels=[("bn1", 0), ("bn1", 1), ("bn2", 0)],
        ema=torch.full((40, 3), early_ema).index_fill(0, torch.arange(30, 40), 0.0),
        batch_means={step: torch.linspace(-1, 1, 5).repeat(3, 1).T for step in (10, 20, 30, 40)},
        std={step: torch.ones(3) for step in (10, 20, 30, 40)},
    )
    runs = [curve("EMA", 0, ema), curve("PreciseBN", 0, precise, weights), *more]
    return ema_vs_precise.judge(Results("data", 4000, IMAGES, runs, sweeps, cloud))


def of_leakage(
    pattern: tuple[float, float, float] = (51.1, 30.9, 23.3),
    ghosts: float = 24.0,
    alarm: int | None = 1,
    false_alarm: int | None = None,
) -> list[Claim]:
    """Population, mini-batch and same-pattern errors of trainings whose errors were 40 % at a third."""
    runs = []
    for seed in (0, 1):
        for arm, errors, of_arm in (
            ("random", (23.7, 23.7, 23.7), false_alarm if seed else None),
            ("pattern", pattern, alarm if seed else 1),
            ("pattern, Ghost BN", (ghosts, 24.0, 24.0), None),
        ):
            named = zip(("population", "mini_batch", "same_pattern"), errors, strict=True)
            curves: Any = {name: [40.0, 40.0, error] for name, error in named}
            runs.append(LeakageTraining(arm, seed, curves, [0.1], 0.5, of_arm))  # type: ignore[arg-type]
    return leakage.judge(LeakageResults("data", 80, "16 classes x 2", 4000, IMAGES, runs))


def of_batch_size(usual: Any = (), small: Any = (), last: float = 0.1) -> list[Claim]:
    """Table 2 as in the paper (0 is the EMA), except for the errors given."""
    paper = {
        32: {0: 23.7, 2: 28.8, 10: 24.0, 100: 23.5, 1000: 23.5, 2000: 23.5, **dict(usual)},
        2: {0: 35.5, 2: 34.4, 10: 32.3, 100: 32.0, 1000: 32.0, 2000: 32.0, **dict(small)},
    }
    gaps = torch.linspace(0.01, last, 9).view(1, 9, 1).repeat(2, 1, 2)
    rows = []
    for nbs, errors in paper.items():
        made = {b: Estimate(wrong(error, 2), gaps, [1.0, 1.0]) for b, error in errors.items()}
        rows.append(BatchSizeRow(nbs, 0, made.pop(0), made))
    return batch_size.judge(BatchSizeResults("data", 4000, IMAGES, 2000, [f"bn{i}" for i in range(9)], rows, []))


def test_the_papers_numbers_hold() -> None:
    assert [claim.verdict for claim in of_leakage()] == ["holds"] * 8
    assert [claim.verdict for claim in of_batch_size()] == ["holds"] * 12
    undecided = [claim.claim for claim in of_ema() if claim.verdict != "holds"]
    assert len(undecided) == 1 and "jumps up and down" in undecided[0], "neither curve rises here"


OTHER_WEIGHTS = curve("EMA", 1, [90, 60, 30, 4]), curve("PreciseBN", 1, [40, 20, 10, 4], "samf")
REVERSED_SEED = curve("EMA", 1, [20, 10, 5, 4]), curve("PreciseBN", 1, [40, 20, 10, 4])


@pytest.mark.parametrize(
    ("judged", "words", "contrary", "verdict"),
    [
        (of_ema, "far above", {"ema": [40, 20, 10, 4], "precise": [90, 60, 30, 4]}, "does not hold"),
        (of_ema, "far above", {"more": REVERSED_SEED}, "within noise"),
        (of_ema, "jumps up and down", {"precise": [10, 80, 10, 80]}, "does not hold"),
        (of_ema, "the EMA is as good", {"ema": [90, 60, 30, 14]}, "does not hold"),
        (of_ema, "At the end: 1,000 images suffice", {"at_1000": 13}, "does not hold"),
        (of_ema, "Unconverged: 10 images are too few", {"at_10": 5}, "does not hold"),
        (of_ema, "only 100 images beats", {"ema": [20, 60, 30, 4]}, "does not hold"),
        (of_ema, "have the same weights", {"more": OTHER_WEIGHTS}, "does not hold"),
        (of_ema, "cloud", {"early_ema": 0.0}, "within noise"),
        (of_leakage, "population than with mini-batch, same", {"pattern": (20.0, 30.9, 23.3)}, "does not hold"),
        (of_leakage, "worse with mini-batch, random than", {"pattern": (51.1, 20.0, 23.3)}, "does not hold"),
        (of_leakage, "population than with mini-batch, random", {"pattern": (25.0, 30.9, 23.3)}, "does not hold"),
        (of_leakage, "rises", {"pattern": (35.0, 30.9, 23.3)}, "does not hold"),
        (of_leakage, "higher with the pattern than with random", {"pattern": (20.0, 30.9, 23.3)}, "does not hold"),
        (of_leakage, "Ghost BN", {"ghosts": 51.1}, "within noise"),
        (of_leakage, "alarms", {"alarm": None}, "does not hold"),
        (of_leakage, "is silent", {"false_alarm": 2}, "does not hold"),
        (of_batch_size, "NBS 32: B = 2 is worse", {"usual": {2: 20.0}}, "does not hold"),
        (of_batch_size, "NBS 32: B = 100 suffices", {"usual": {100: 27.0}}, "does not hold"),
        (of_batch_size, "NBS 2: PreciseBN with B = 100 beats the EMA", {"small": {0: 27.0}}, "does not hold"),
        (of_batch_size, "the NBS 2 model is still worse", {"small": {2000: 20.0}}, "does not hold"),
        (of_batch_size, "NBS 32: the error of small B grows", {"last": 0.001}, "does not hold"),
    ],
)
def test_contrary_numbers_decide(judged: Callable[..., list[Claim]], words: str, contrary: Any, verdict: str) -> None:
    assert [claim.verdict for claim in judged(**contrary) if words in claim.claim] == [verdict]


def of_roi_head(box_ap: Any, spread: float, seeds: int = 3) -> RoIHeadResults:
    """Seeds and four parts, whose APs spread around these."""
    rows = [RoIHeadRow(*cell, seed, ap, None, 1.0) for seed, cell, ap in spread_out(box_ap, spread, seeds)]
    return RoIHeadResults("data", 2, 10, 4, 20, rows)


def of_shared_head(box_ap: Any, spread: float) -> SharedHeadResults:
    rows = [SharedHeadRow(row, seed, ap, 1.0) for seed, row, ap in spread_out(box_ap, spread)]
    return SharedHeadResults("data", 4, 1, 10, 4, 20, rows)


def spread_out(box_ap: Any, spread: float, seeds: int = 3) -> Iterable[tuple[int, Any, AP]]:
    for seed in range(seeds):
        for index, (row, ap) in enumerate(box_ap.items()):
            generator = torch.Generator().manual_seed(100 * seed + index)
            parts = (ap + spread * torch.randn(5, generator=generator)).tolist()
            yield seed, row, AP(parts[0], parts[1:])


BOX = {cell: box for cell, (box, _) in roi_head.PAPER.items()}


BY_AP = [(roi_head, of_roi_head, BOX, 8), (shared_head, of_shared_head, shared_head.PAPER, 6)]


@pytest.mark.parametrize(("module", "results", "paper", "ordered"), BY_AP)
def test_the_papers_aps_hold_reversed_do_not_and_a_wide_spread_decides_nothing(
    module: Any, results: Any, paper: Any, ordered: int
) -> None:
    assert {claim.verdict for claim in module.judge(results(paper, 0.02))} == {"holds"}
    turned = module.judge(results({row: 80 - ap for row, ap in paper.items()}, 0.02))
    found = [claim.verdict for claim in turned if "as good" not in claim.claim]
    assert found == ["does not hold"] * ordered
    assert {claim.verdict for claim in module.judge(results(paper, 200.0))} == {"within noise"}


def test_with_one_seed_the_parts_of_the_images_decide() -> None:
    one = of_roi_head(BOX, spread=200.0, seeds=1)
    equal_aps = replace(one, rows=[replace(row, box=replace(row.box, all_images=40.0)) for row in one.rows])
    assert {claim.verdict for claim in roi_head.judge(equal_aps)} == {"within noise"}
    same = [replace(row, box=AP(BOX[row.training, row.inference], [1.0] * 4)) for row in one.rows]
    of_all = roi_head.judge(replace(one, rows=same))
    assert {claim.verdict for claim in of_all} == {"holds"}, "of all images, not of the parts"


def test_claims_are_about_rows_of_the_tables_and_every_row_is_trained() -> None:
    assert {cell for _, a, b, _ in roi_head.ORDERINGS for cell in (a, b)} <= set(BOX)
    assert [(key, inference) for key, one in ROI_TRAININGS.items() for inference in one.inferences] == list(BOX)
    rows = {row for _, a, b, _ in shared_head.ORDERINGS for row in (a, b)}
    assert rows == set(shared_head.PAPER) == set(ROWS) == {row for pair in TRAININGS for row in pair}
    some = of_shared_head({row: shared_head.PAPER[row] for row in (3, 4)}, 0.02)
    assert [claim.paper for claim in shared_head.judge(some)] == ["39.1 and 34.1"]


@pytest.mark.parametrize(
    ("row", "other", "rule", "verdict"),
    [
        ([30.0, 31.0, 32.0], [20.0, 21.0, 22.0], larger, "holds"),
        ([20.0, 21.0, 22.0], [30.0, 31.0, 32.0], larger, "does not hold"),
        ([30.0, 31.0, 32.0], [30.0, 21.0, 32.0], larger, "within noise"),
        ([30.0], [30.2], equal, "holds"),
    ],
)
def test_an_ordering_is_decided_by_the_spread(row: list[float], other: list[float], rule: Any, verdict: str) -> None:
    measured = [Measured([AP(ap, [0.0, 0.0]) for ap in aps], 39.1) for aps in (row, other)]
    assert ordering("", *measured, rule).verdict == verdict
    unlike = Measured([AP(30.0, [50.0, 0.0])], 39.1)
    assert ordering("", unlike, Measured([AP(20.0, [0.0, 0.0])], 39.1), larger).verdict == "within noise"


@pytest.mark.parametrize(
    ("mean", "half", "is_larger", "is_equal"),
    [
        (2.0, 0.5, "holds", "does not hold"),
        (-2.0, 0.5, "does not hold", "does not hold"),
        (0.5, 0.2, "holds", "holds"),
        (0.5, 0.6, "within noise", "within noise"),
        (0.0, 0.9, "within noise", "holds"),
    ],
)
def test_verdicts_by_the_interval(mean: float, half: float, is_larger: str, is_equal: str) -> None:
    assert (larger(Interval(mean, half)), equal(Interval(mean, half))) == (is_larger, is_equal)


def test_half_width_is_students_t() -> None:
    assert half_width([1.0]) == 0
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484, abs=0.01)  # scipy.stats.t.interval
    assert half_width(torch.linspace(-1, 1, 1001)) == pytest.approx(1.96 * 0.5779 / 1001**0.5, rel=1e-3)
