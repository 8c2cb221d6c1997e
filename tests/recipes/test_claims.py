"""The verdicts of the report are decided by the numbers, in all three directions."""

import pytest
import torch

from recipes.claims import Claim, Interval, equal, half_width, larger
from recipes.ema_vs_precise.claims import judge
from recipes.ema_vs_precise.experiment import Cloud, Results, Sweep, Training

IMAGES = 10_000


def run(arm: str, seed: int, errors: list[float], weights: str = "same") -> Training:
    epochs = [float(epoch + 1) for epoch in range(len(errors))]
    return Training(arm, seed, epochs, errors, [weights] * len(errors), [], [10, 20, 30, 40])  # type: ignore[arg-type]


def wrong(error: float, draws: int = 1) -> torch.Tensor:
    """`error` percent of the images wrong, the same ones in every draw."""
    images = torch.zeros(draws, IMAGES, dtype=torch.float64)
    images[:, : round(error / 100 * IMAGES)] = 1
    return images


def results(
    ema: list[float] = [90, 60, 30, 4],  # noqa: B006
    precise: list[float] = [40, 20, 10, 4],  # noqa: B006
    at_10: float = 20,
    at_1000: float = 10,
    weights: str = "same",
    early_ema: float = 5.0,
) -> Results:
    sweeps = []
    for epoch, ema_error in ((1.0, ema[0]), (4.0, ema[-1])):
        population = precise[0 if epoch == 1 else -1]
        offset = population - 10
        errors = {10: at_10 + offset, 100: 11 + offset, 1000: at_1000 + offset, 4000: population}
        precise_wrong = {n: wrong(error, draws=1 if n == 4000 else 3) for n, error in errors.items()}
        sweeps.append(Sweep(0, epoch, wrong(ema_error), precise_wrong))
    cloud = Cloud(
        channels=[("bn1", 0), ("bn1", 1), ("bn2", 0)],
        ema=torch.full((40, 3), early_ema).index_fill(0, torch.arange(30, 40), 0.0),
        batch_means={step: torch.linspace(-1, 1, 5).repeat(3, 1).T for step in (10, 20, 30, 40)},
        std={step: torch.ones(3) for step in (10, 20, 30, 40)},
    )
    runs = [run("EMA", 0, ema), run("PreciseBN", 0, precise, weights)]
    return Results("data", 4000, IMAGES, runs, sweeps, cloud)


def verdict(found: list[Claim], words: str) -> str:
    (claim,) = (claim for claim in found if words in claim.claim)
    return claim.verdict


def test_the_papers_pattern_holds() -> None:
    found = judge(results())
    assert [claim.verdict for claim in found if claim.verdict != "holds"] == ["within noise"]
    assert verdict(found, "jumps up and down") == "within noise", "neither curve rises here"


@pytest.mark.parametrize(
    ("words", "contrary"),
    [
        ("far above", {"ema": [40, 20, 10, 4], "precise": [90, 60, 30, 4]}),
        ("jumps up and down", {"precise": [10, 80, 10, 80]}),
        ("the EMA is as good", {"ema": [90, 60, 30, 14]}),
        ("At the end: 1,000 images suffice", {"at_1000": 13}),
        ("Unconverged: 10 images are too few", {"at_10": 5}),
        ("only 100 images beats", {"ema": [20, 60, 30, 4]}),
        ("have the same weights", {"weights": "other"}),
    ],
)
def test_a_claim_that_the_numbers_contradict_does_not_hold(words: str, contrary: dict[str, object]) -> None:
    assert verdict(judge(results(**contrary)), words) == "does not hold"  # type: ignore[arg-type]


def test_an_ema_that_stays_inside_the_cloud_leaves_the_claim_of_fig_2_undecided() -> None:
    assert verdict(judge(results(early_ema=0.0)), "cloud") == "within noise"


def test_one_letter_of_difference_in_the_weights_is_found() -> None:
    measured = results()
    measured.trainings[1].weights[-1] = "samf"
    assert verdict(judge(measured), "have the same weights") == "does not hold"


def test_two_seeds_that_disagree_cannot_decide() -> None:
    measured = results()
    measured.trainings.extend([run("EMA", 1, [20, 10, 5, 4]), run("PreciseBN", 1, [40, 20, 10, 4])])
    assert verdict(judge(measured), "far above") == "within noise"


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
    assert larger(Interval(mean, half)) == is_larger
    assert equal(Interval(mean, half)) == is_equal


def test_half_width_is_students_t() -> None:
    assert half_width([1.0]) == 0
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484, abs=0.01)  # scipy.stats.t.interval
    assert half_width(torch.linspace(-1, 1, 1001)) == pytest.approx(1.96 * 0.5779 / 1001**0.5, rel=1e-3)
