"""The paper's claims about EMA and PreciseBN, judged by the rules of `recipes/claims.py`."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from recipes.claims import MARGIN, Claim, equal, interval, larger, mean_error, paired, unpaired
from recipes.ema_vs_precise.experiment import Cloud, Results, Sweep, unconverged_and_final


def judge(results: Results) -> list[Claim]:
    """Judges every claim that these results can decide."""
    found = [same_weights(results), unconverged(results), unstable(results)]
    by_epoch = list(results.sweeps_by_epoch().values())
    early, final = by_epoch[0], by_epoch[-1]
    found += converged(final)
    found += few_images_beat_ema(early)
    if len(by_epoch) > 1:
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
        "PreciseBN changes the statistics only: both trainings have the same weights",
        "two ways to train the statistics of one model (Sec. 3)",
        f"parameters bit-identical at {sum(compared)} of {len(compared)} validations",
        "holds" if all(compared) else "does not hold",
    )


def unconverged(results: Results) -> Claim:
    ema, precise = _errors(results)
    half = ema.shape[1] // 2 + ema.shape[1] % 2
    a, b = ema[:, :half].mean(1), precise[:, :half].mean(1)
    gap = interval(a - b, at_least=unpaired(float(a.mean()), float(b.mean()), results.validation_images))
    return Claim(
        "Large batches, before convergence: EMA's error is far above PreciseBN's on the same weights",
        "batch 8192, mean of epochs 5, 10, 20, 30: 60.8 against 47.1 (Fig. 4)",
        f"mean over the first half of training: {a.mean():.1f} against {b.mean():.1f} (difference {gap})",
        larger(gap),
    )


def unstable(results: Results) -> Claim:
    ema, precise = _errors(results)
    a, b = (errors.diff(dim=1).clamp(min=0).sum(1) for errors in (ema, precise))
    # Sampling errors make a flat curve rise, too: one per epoch, and they add up like independent ones.
    chance = unpaired(float(ema.mean()), float(precise.mean()), results.validation_images) * math.sqrt(ema.shape[1])
    gap = interval(a - b, at_least=chance)
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
    a, b = mean_error(s.ema for s in final), mean_error(s.precise[n] for s in final)
    gap = paired([(s.ema, s.precise[n]) for s in final])
    yield Claim(
        f"At the end of training the EMA is as good (within {MARGIN:g} point)",
        "batch 8192, epoch 100: 24.0 against 23.8 (Table 1)",
        f"{a:.1f} against {b:.1f} (difference {gap})",
        equal(gap),
    )


def few_images_beat_ema(early: Sequence[Sweep]) -> Iterator[Claim]:
    if any(100 not in s.precise for s in early):
        return
    a, b = mean_error(s.ema for s in early), mean_error(s.precise[100] for s in early)
    gap = paired([(s.ema, s.precise[100]) for s in early])
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
    a, b = mean_error(s.precise[1000] for s in sweeps), mean_error(s.precise[population] for s in sweeps)
    gap = paired([(s.precise[1000], s.precise[population]) for s in sweeps])
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
    a, b = mean_error(s.precise[10] for s in sweeps), mean_error(s.precise[n] for s in sweeps)
    gap = paired([(s.precise[10], s.precise[n]) for s in sweeps])
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
    gaps = [float((outside[early][columns] - outside[final][columns]).mean()) * 100 for columns in of_layer.values()]
    gap = interval(gaps, at_least=0.0)
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
    """1,000, or the whole population if it is smaller; None if neither was measured."""
    n = min(1000, max(sweeps[0].precise))
    return n if all(n in sweep.precise for sweep in sweeps) else None
