"""The paper's claims about leakage beside what was measured, judged by the rules of `recipes/claims.py`.

Mini-batch errors are not known image by image, so that images count as independent, which is wider.
"""

import math
from collections.abc import Iterator, Sequence

from recipes.batch_leakage.experiment import NAMES, Arm, Results, Run, Statistics
from recipes.claims import Claim, Verdict, interval, larger

Errors = Sequence[float]  # one a seed


def claims(results: Results) -> list[Claim]:
    """Every claim that these results can speak to."""
    return [
        *_the_gap(results),
        *_population_rises(results),
        _leakage_costs(results),
        _ghosts_help(results),
        _alarms(results, "pattern", expected=True),
        _alarms(results, "random", expected=False),
    ]


def _the_gap(results: Results) -> Iterator[Claim]:
    runs = results.of("pattern")
    pairs: tuple[tuple[Statistics, Statistics, str], ...] = (
        ("population", "same_pattern", "51.1 and 23.3"),
        ("mini_batch", "same_pattern", "30.9 and 23.3"),
        ("population", "mini_batch", "51.1 and 30.9"),
    )
    for above, below, paper in pairs:
        yield _compared(
            f"Trained with the pattern: worse with {NAMES[above]} than with {NAMES[below]} statistics",
            paper,
            _final(runs, above),
            _final(runs, below),
            results.validation_images,
        )


def _population_rises(results: Results) -> Iterator[Claim]:
    """The paper's curve has its lowest point at epoch 33 of 100."""
    runs = results.of("pattern")
    third = len(runs[0].errors["population"]) // 3
    if third == 0:
        return
    early = [run.errors["population"][third - 1] for run in runs]
    yield _compared(
        "Trained with the pattern: population error rises from a third of the training to its end",
        "38.0 to 51.1",
        _final(runs, "population"),
        early,
        results.validation_images,
    )


def _leakage_costs(results: Results) -> Claim:
    return _compared(
        "At the end population error is higher with the pattern than with random batches",
        "51.1; 23.7 with random batches (Table 2)",
        _final(results.of("pattern"), "population"),
        _final(results.of("random"), "population"),
        results.validation_images,
    )


def _ghosts_help(results: Results) -> Claim:
    return _compared(
        "Ghost BN over images of different classes lowers the population error of the pattern",
        "named, without a number",
        _final(results.of("pattern"), "population"),
        _final(results.of("pattern, Ghost BN"), "population"),
        results.validation_images,
    )


def _alarms(results: Results, arm: Arm, expected: bool) -> Claim:
    runs = results.of(arm)
    as_expected = sum((run.alarm is not None) == expected for run in runs)
    verdict: Verdict = "holds" if as_expected == len(runs) else "does not hold"
    words = "alarms where batches follow the pattern" if expected else "is silent where batches are random"
    return Claim(f"BatchLeakageMonitor {words}", "not in the paper", "; ".join(map(alarm_in_words, runs)), verdict)


def alarm_in_words(run: Run) -> str:
    """What the monitor said in a run."""
    if run.alarm is None:
        return f"silent (p = {run.p_value:.2g})"
    return f"alarm in epoch {run.alarm} (p = {run.p_value:.1g}, correlation {run.icc[-1]:+.2f})"


def _compared(words: str, paper: str, above: Errors, below: Errors, images: int) -> Claim:
    a, b = sum(above) / len(above), sum(below) / len(below)
    of_images = 1.96 * math.sqrt(sum(error * (100 - error) / images for error in (a, b)))
    difference = interval([x - y for x, y in zip(above, below, strict=True)], at_least=of_images)
    return Claim(words, paper, f"{a:.1f} and {b:.1f} (difference {difference})", larger(difference))


def _final(runs: Sequence[Run], statistics: Statistics) -> Errors:
    return [run.errors[statistics][-1] for run in runs]
