"""The paper's claims about leakage, judged by the rules of `recipes/claims.py`.

Mini-batch errors are not known image by image. Their images count as independent, which makes intervals wider.
"""

from collections.abc import Iterator, Sequence

from recipes.batch_leakage.experiment import STATISTICS, Arm, Results, Statistics, Training
from recipes.claims import Claim, Verdict, interval, larger, unpaired

Errors = Sequence[float]  # one per seed


def judge(results: Results) -> list[Claim]:
    """Judges every claim that these results can decide."""
    population = {arm: _final(results.of(arm), "population") for arm in ("random", "pattern", "pattern, Ghost BN")}
    costs = _compared(
        "At the end, population error is higher with the pattern than with random batches",
        "51.1; 23.7 with random batches (Table 2)",
        (population["pattern"], population["random"]),
        results.validation_images,
    )
    ghost = _compared(
        "Ghost BN over images of different classes lowers the population error of the pattern",
        "stated without a number",
        (population["pattern"], population["pattern, Ghost BN"]),
        results.validation_images,
    )
    alarms = [_alarms(results, "pattern", expected=True), _alarms(results, "random", expected=False)]
    return [*_gaps(results), *_population_rises(results), costs, ghost, *alarms]


def _gaps(results: Results) -> Iterator[Claim]:
    trainings = results.of("pattern")
    pairs: tuple[tuple[Statistics, Statistics, str], ...] = (
        ("population", "same_pattern", "51.1 and 23.3"),
        ("mini_batch", "same_pattern", "30.9 and 23.3"),
        ("population", "mini_batch", "51.1 and 30.9"),
    )
    for worse, better, paper in pairs:
        yield _compared(
            f"Trained with the pattern: worse with {STATISTICS[worse]} than with {STATISTICS[better]} statistics",
            paper,
            (_final(trainings, worse), _final(trainings, better)),
            results.validation_images,
        )


def _population_rises(results: Results) -> Iterator[Claim]:
    """The lowest point of the paper's curve is epoch 33 of 100."""
    trainings = results.of("pattern")
    third = len(trainings[0].errors["population"]) // 3
    if third:
        early = [training.errors["population"][third - 1] for training in trainings]
        yield _compared(
            "Trained with the pattern: population error rises from a third of the training to its end",
            "38.0 to 51.1",
            (_final(trainings, "population"), early),
            results.validation_images,
        )


def _alarms(results: Results, arm: Arm, *, expected: bool) -> Claim:
    trainings = results.of(arm)
    as_expected = all((training.alarm is not None) == expected for training in trainings)
    verdict: Verdict = "holds" if as_expected else "does not hold"
    words = "alarms if batches follow the pattern" if expected else "is silent if batches are random"
    return Claim(f"BatchLeakageMonitor {words}", "not in the paper", "; ".join(map(outcome, trainings)), verdict)


def outcome(training: Training) -> str:
    """The monitor's result of a training, in words."""
    if training.alarm is None:
        return f"silent (p = {training.p_value:.2g})"
    return f"alarm in epoch {training.alarm} (p = {training.p_value:.1g}, correlation {training.icc[-1]:+.2f})"


def _compared(claim: str, paper: str, errors: tuple[Errors, Errors], images: int) -> Claim:
    a, b = (sum(by_seed) / len(by_seed) for by_seed in errors)
    difference = interval([x - y for x, y in zip(*errors, strict=True)], at_least=unpaired(a, b, images))
    return Claim(claim, paper, f"{a:.1f} and {b:.1f} (difference {difference})", larger(difference))


def _final(trainings: Sequence[Training], statistics: Statistics) -> Errors:
    return [training.errors[statistics][-1] for training in trainings]
