"""What the paper says beside what was measured here, judged by fixed rules.

Two kinds of claim, both on the 95 % interval of a difference A - B:
- `larger`: holds if the interval lies above zero, does not hold if it lies below.
- `equal`: holds if the interval lies within one point of error, does not hold if it lies outside.
In every other case the verdict is "within noise": these numbers cannot decide it.

The interval's half-width is the larger of two: over the repetitions there are (seeds, draws or layers), and
over the validation images, paired where both errors are known image by image and as of independent images
(wider) where not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recipes.ema_vs_precise.experiment import Cloud, Results, Sweep, unconverged_and_final

Verdict = Literal["holds", "does not hold", "within noise"]
MARGIN = 1.0  # points of validation error that count as equal
STUDENT_95 = (
    math.inf,
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
)  # by degrees of freedom; the last for more


@dataclass(frozen=True)
class Claim:
    """One line of the report."""

    claim: str
    paper: str
    measured: str
    verdict: Verdict


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}"


def larger(difference: Interval) -> Verdict:
    if difference.mean - difference.half > 0:
        return "holds"
    return "does not hold" if difference.mean + difference.half < 0 else "within noise"


def equal(difference: Interval) -> Verdict:
    if abs(difference.mean) + difference.half < MARGIN:
        return "holds"
    return "does not hold" if abs(difference.mean) - difference.half > MARGIN else "within noise"


def half_width(values: Sequence[float] | Tensor) -> float:
    """Of the 95 % interval of the mean of repeated measurements; 0 for a single one: it has no spread."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return 0.0
    degrees = len(values) - 1
    t = 1.96 if degrees > 100 else STUDENT_95[min(degrees, len(STUDENT_95) - 1)]
    return t * float(values.std()) / math.sqrt(len(values))


def claims(results: Results) -> list[Claim]:
    """Every claim that these results can speak to."""
    found = [same_weights(results), unconverged(results), unstable(results)]
    first, last = (min(s.epoch for s in results.sweeps), max(s.epoch for s in results.sweeps))
    early = [sweep for sweep in results.sweeps if sweep.epoch == first]
    final = [sweep for sweep in results.sweeps if sweep.epoch == last]
    found += converged(final)
    found += few_images_beat_ema(early)
    if first < last:
        found += thousand_suffice(early, "unconverged", "39.44 at 1e3, 39.42 at 1e4")
        found += ten_are_too_few(early, "unconverged", "45.5 at 10, 39.4 at 1e3")
    found += thousand_suffice(final, "at the end", "23.77 at 1e3, 23.73 at 1e4")
    found += ten_are_too_few(final, "at the end", "29.0 at 10, 23.8 at 1e3")
    found += ema_leaves_the_cloud(results.cloud)
    return found


def same_weights(results: Results) -> Claim:
    pairs = list(zip(results.of("EMA"), results.of("PreciseBN"), strict=True))
    compared = [a == b for ema, precise in pairs for a, b in zip(ema.weights, precise.weights, strict=True)]
    return Claim(
        "PreciseBN changes the statistics only: both arms go through the same weights",
        "two ways to train the statistics of one model (Sec. 3)",
        f"parameters bit-identical at {sum(compared)} of {len(compared)} validations",
        "holds" if all(compared) else "does not hold",
    )


def unconverged(results: Results) -> Claim:
    ema, precise = _errors(results)
    half = ema.shape[1] // 2 + ema.shape[1] % 2
    a, b = ema[:, :half].mean(1), precise[:, :half].mean(1)
    gap = _interval(a - b, _sampling(a.mean(), b.mean(), results.validation_images))
    return Claim(
        "Large batches, before convergence: EMA's error is far above PreciseBN's on the same weights",
        "batch 8192, mean of epochs 5, 10, 20, 30: 60.8 against 47.1 (Fig. 4)",
        f"mean over the first half of training: {a.mean():.1f} against {b.mean():.1f} (difference {gap})",
        larger(gap),
    )


def unstable(results: Results) -> Claim:
    ema, precise = _errors(results)
    a, b = (errors.diff(dim=1).clamp(min=0).sum(1) for errors in (ema, precise))
    # Chance alone makes a flat curve rise, too: one sampling error an epoch, adding up like independent ones.
    chance = _sampling(ema.mean(), precise.mean(), results.validation_images) * math.sqrt(ema.shape[1])
    gap = _interval(a - b, chance)
    return Claim(
        "EMA's validation error jumps up and down, PreciseBN's falls steadily",
        "batch 8192, epoch 20 to 30: EMA 50.3 to 52.8, PreciseBN 40.5 to 39.4 (Fig. 4)",
        f"sum of all rises from one validation to the next: {a.mean():.1f} against {b.mean():.1f} points "
        f"(difference {gap})",
        larger(gap),
    )


def converged(final: Sequence[Sweep]) -> Iterator[Claim]:
    n = _thousand(final)
    if n is None:
        return
    a, b = _mean(s.ema for s in final), _mean(s.precise[n] for s in final)
    gap = _paired([(s.ema, s.precise[n]) for s in final])
    yield Claim(
        f"At the end of training the EMA is as good (within {MARGIN:g} point)",
        "batch 8192, epoch 100: 24.0 against 23.8 (Table 1)",
        f"{a:.1f} against {b:.1f} (difference {gap})",
        equal(gap),
    )


def few_images_beat_ema(early: Sequence[Sweep]) -> Iterator[Claim]:
    if any(100 not in s.precise for s in early):
        return
    a, b = _mean(s.ema for s in early), _mean(s.precise[100] for s in early)
    gap = _paired([(s.ema, s.precise[100]) for s in early])
    yield Claim(
        "Unconverged: PreciseBN over only 100 images beats the EMA",
        "batch 8192, epoch 30: EMA 52.8, N=100 40.1 (Table 1)",
        f"epoch {early[0].epoch:.3g}: EMA {a:.1f}, N=100 {b:.1f} (difference {gap})",
        larger(gap),
    )


def thousand_suffice(sweeps: Sequence[Sweep], state: str, paper: str) -> Iterator[Claim]:
    population = max(sweeps[0].precise)
    if any(1000 not in s.precise for s in sweeps) or population <= 1000:
        return
    a, b = _mean(s.precise[1000] for s in sweeps), _mean(s.precise[population] for s in sweeps)
    gap = _paired([(s.precise[1000], s.precise[population]) for s in sweeps])
    yield Claim(
        f"{state.capitalize()}: 1,000 images suffice (within {MARGIN:g} point of the whole population)",
        f"batch 8192: {paper} (Table 1)",
        f"{a:.1f} at 1,000, {b:.1f} at {population:,} (difference {gap})",
        equal(gap),
    )


def ten_are_too_few(sweeps: Sequence[Sweep], state: str, paper: str) -> Iterator[Claim]:
    n = _thousand(sweeps)
    if n is None or any(10 not in s.precise for s in sweeps):
        return
    a, b = _mean(s.precise[10] for s in sweeps), _mean(s.precise[n] for s in sweeps)
    gap = _paired([(s.precise[10], s.precise[n]) for s in sweeps])
    yield Claim(
        f"{state.capitalize()}: 10 images are too few",
        f"batch 8192: {paper} (Table 1)",
        f"{a:.1f} at 10, {b:.1f} at {n:,} (difference {gap})",
        larger(gap),
    )


def ema_leaves_the_cloud(cloud: Cloud) -> Iterator[Claim]:
    steps = sorted(cloud.batch_means)
    early, final = (steps[index] for index in (unconverged_and_final(len(steps)) * 2)[:2])
    if early == final:
        return
    outside = {step: _outside(cloud, step) for step in (early, final)}
    layers = [layer for layer, _ in cloud.channels]
    of_layer = {layer: torch.tensor([name == layer for name in layers]) for layer in dict.fromkeys(layers)}
    gaps = [float((outside[early][own] - outside[final][own]).mean()) * 100 for own in of_layer.values()]
    gap = _interval(gaps, 0.0)
    shares = [100 * float(outside[step].mean()) for step in (early, final)]
    yield Claim(
        "Before convergence the EMA lies outside the whole cloud of batch means, at the end inside it",
        "shown for one channel (Fig. 2)",
        f"channels whose EMA lies outside the range of {len(cloud.batch_means[early])} batch means: "
        f"{shares[0]:.0f} % at step {early:,}, {shares[1]:.0f} % at step {final:,} "
        f"(difference over {len(gaps)} layers {gap})",
        larger(gap),
    )


def _outside(cloud: Cloud, step: int) -> Tensor:
    ema, batches = cloud.ema[step - 1], cloud.batch_means[step]
    return ((ema < batches.amin(0)) | (ema > batches.amax(0))).double()


def _errors(results: Results) -> tuple[Tensor, Tensor]:
    ema, precise = (
        torch.tensor([run.errors for run in results.of(arm)], dtype=torch.float64) for arm in ("EMA", "PreciseBN")
    )
    return ema, precise


def _thousand(sweeps: Sequence[Sweep]) -> int | None:
    """1,000, or the whole population where that is smaller; None where neither was measured."""
    n = min(1000, max(sweeps[0].precise))
    return n if all(n in sweep.precise for sweep in sweeps) else None


def _mean(wrong: Iterator[Tensor]) -> float:
    return 100 * float(torch.stack([w.mean() for w in wrong]).mean())


def _interval(repeated: Sequence[float] | Tensor, at_least: float) -> Interval:
    values = torch.as_tensor(repeated, dtype=torch.float64)
    return Interval(float(values.mean()), max(half_width(values), at_least))


def _paired(pairs: Sequence[tuple[Tensor, Tensor]]) -> Interval:
    """Of the difference in error of A and B, each (draws, images), one pair a seed."""
    per_seed = [
        100 * (a.mean(1) - b.mean(1)) for a, b in pairs
    ]  # a single draw is compared with every draw of the other
    repeated = torch.stack([d.mean() for d in per_seed]) if len(pairs) > 1 else per_seed[0]
    per_image = torch.stack([100 * (a.mean(0) - b.mean(0)) for a, b in pairs]).mean(0)
    return _interval(repeated, half_width(per_image))


def _sampling(a: float | Tensor, b: float | Tensor, images: int) -> float:
    """Half-width of the difference of two error rates (%), each measured on so many images of its own."""
    return 1.96 * math.sqrt(sum(float(p) * (100 - float(p)) for p in (a, b)) / images)
