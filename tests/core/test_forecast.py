"""Forecasts on made-up traces with a known truth, compared with the EMA, with single averages, and with the formula."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_bn.tracking.forecast import SPANS, Forecast, Steps, forecast_statistics

CHANNELS = 32
EPS = 1e-5


def forecast(batches: Tensor, before: Tensor, now: Tensor, sizes: list[int], known: Tensor | None = None) -> Forecast:
    known = torch.ones(len(batches), sum(sizes), dtype=torch.bool) if known is None else known
    return forecast_statistics(Steps(batches, before, known), now, torch.full((sum(sizes),), EPS).double(), sizes)


def ema_of(batches: Tensor, momentum: float = 0.1, known: Tensor | None = None) -> Tensor:
    """Running statistics before each batch and after the last, ``(N + 1, 2, C)``."""
    running = [torch.stack([torch.zeros(batches.shape[2]), torch.ones(batches.shape[2])]).double()]
    for step, batch in enumerate(batches):
        moved = (1 - momentum) * running[-1] + momentum * batch
        running.append(moved if known is None else torch.where(known[step], moved, running[-1]))
    return torch.stack(running)


def errors(path: Callable[[int], float], noise: float, steps: int, start: int, momentum: float = 0.1) -> Tensor:
    """Errors about the next step's mean, in sigma, of forecast, EMA and last batch: ``(3, N)``, rms.

    The mean of each channel follows ``path`` with its own sign and size, in batches of some noise.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
    truth = torch.tensor([path(step) for step in range(steps + 1)]).double()[:, None] * scale
    batches = torch.stack([truth[:-1], torch.ones(steps, CHANNELS, dtype=torch.float64)], 1)
    batches[:, 0] += noise * torch.randn(steps, CHANNELS, generator=generator, dtype=torch.float64)
    running = ema_of(batches, momentum)
    found = []
    for step in range(start, steps, 3):
        last = slice(max(0, step - 31), step + 1)
        means = forecast(batches[last], running[last], running[step + 1], [CHANNELS]).mean
        estimates = torch.stack([means, running[step + 1, 0], batches[step, 0]])
        found.append((estimates - truth[step + 1]).square().mean(1).sqrt())
    return torch.stack(found, 1)


def rms(values: Tensor) -> list[float]:
    return values.square().mean(1).sqrt().tolist()


def test_noise_is_averaged_away_and_drifts_and_oscillations_are_followed_without_lag() -> None:
    found, ema, last = rms(errors(lambda step: 0.0, noise=0.1, steps=200, start=60))
    assert found < 1.05 * ema and found < 0.3 * last
    found, ema, last = rms(errors(lambda step: 0.05 * step, noise=0.0, steps=100, start=20))
    assert ema > 0.3 and found < 0.005 < last
    found, ema, last = rms(errors(lambda step: math.sin(2 * math.pi * step / 12), noise=0.01, steps=150, start=40))
    assert found < 0.8 * last < 0.8 * ema
    trace = errors(lambda step: 0.1 * min(step, 60), noise=0.05, steps=120, start=60)  # the learning rate drops at 60
    found, ema, last = rms(trace[:, 5:])
    assert found < 0.8 * last and found < ema
    assert trace[0, :5].max() < 0.3, "an overshoot of about three steps' drift"


WALKS = [(0.0, 0.1, 0.1), (0.001, 0.5, 0.01), (0.01, 0.01, 0.1), (0.01, 0.5, 0.1), (0.1, 0.01, 0.01), (0.1, 0.5, 0.1)]


@pytest.mark.parametrize(("drift", "noise", "momentum"), WALKS)
def test_it_is_nowhere_worse_than_the_ema(drift: float, noise: float, momentum: float) -> None:
    walk = torch.cumsum(drift * torch.randn(301, generator=torch.Generator().manual_seed(1)), 0).tolist()
    found, ema, last = rms(errors(walk.__getitem__, noise, steps=300, start=50, momentum=momentum))
    assert found < (1.05 if momentum == 0.1 else 1.25) * ema  # ten steps hardly tell 32 steps' average from 199's
    assert found < 1.1 * last


def test_the_variance_is_that_of_the_population_with_that_of_the_batches_means() -> None:
    """Batches of 16 rows that share half of their variance, as the pixels of an image do: Eq. 2."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(200, 4, 1, CHANNELS, generator=generator, dtype=torch.float64)
    own = torch.randn(200, 4, 64, CHANNELS, generator=generator, dtype=torch.float64)
    rows = ((shared + own) / 2**0.5).flatten(1, 2)  # variance 1, of which means of batches have 1/8
    batches = torch.stack([rows.mean(1), rows.var(1)], 1)
    running = ema_of(batches)
    parts = [slice(step - 32, step) for step in range(100, 200, 5)]
    variances = [forecast(batches[p], running[p], running[p.stop], [CHANNELS]).var.mean() for p in parts]
    assert abs(torch.stack(variances).mean() - 1) < 0.04
    assert abs(running[-1, 1].mean() - 1) > 0.08, "which leaves the variance of means out"


def noisy(steps: int, channels: int, seed: int = 0) -> Tensor:
    """Batches of drifting means and variances, ``(steps, 2, C)``."""
    generator = torch.Generator().manual_seed(seed)
    walk = 0.1 * torch.randn(steps, 2, channels, generator=generator, dtype=torch.float64).cumsum(0)
    return torch.stack([walk[:, 0], walk[:, 1].exp()], 1)


def of_ema(batches: Tensor, sizes: list[int], known: Tensor | None = None) -> Tensor:
    """Means and variances forecast from batches and their EMA, ``(2, C)``."""
    running = ema_of(batches, known=known)
    return torch.stack(forecast(batches, running[:-1], running[-1], sizes, known)[:2])


def test_until_two_steps_are_known_it_is_the_running_statistics() -> None:
    running = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    for steps in (1, 2):
        batches = noisy(steps, 2)
        mean, var, error = forecast(batches, running.expand_as(batches), running, [1, 1])
        assert torch.equal(torch.stack([mean, var]), running) == (steps == 1)
        assert bool(error.isnan().all()) == (steps == 1) == bool(error.isnan().any())


def test_other_layers_dead_channels_and_steps_without_a_call_change_nothing() -> None:
    batches = noisy(30, 108)
    apart = torch.cat([of_ema(part, [part.shape[2]]) for part in batches.split([3, 105], 2)], 1)
    torch.testing.assert_close(of_ema(batches, [3, 105]), apart, rtol=1e-10, atol=0)
    batches = noisy(30, 4)
    wild = torch.stack([torch.randn(30, 1), torch.zeros(30, 1)], 1).double()  # no variance, a mean that jumps about
    running = torch.cat([ema_of(batches), torch.tensor([[0.0], [1e-9]]).expand(31, 2, 1)], 2)
    found = torch.stack(forecast(torch.cat([batches, wild], 2), running[:-1], running[-1], [5])[:2])
    torch.testing.assert_close(found[:, :4], of_ema(batches, [4]), rtol=1e-9, atol=0)
    batches = noisy(32, 3)
    known = (torch.arange(32) % 4 != 0)[:, None].expand(32, 3)
    torch.testing.assert_close(of_ema(batches, [3], known), of_ema(batches[known[:, 0]], [3]), rtol=1e-10, atol=0)


def test_a_nan_batch_is_left_out_and_poisoned_running_statistics_as_well() -> None:
    batches = noisy(30, 3)
    running = ema_of(batches)
    with_nan = torch.cat([batches[:20], torch.full((1, 2, 3), torch.nan), batches[20:]])
    before = torch.cat([running[:21], running[20:-1]])
    found = forecast(with_nan, before, running[-1], [3])
    torch.testing.assert_close(torch.stack(found[:2]), of_ema(batches, [3]), rtol=1e-10, atol=0)
    mean, var, _ = forecast(batches, running[:-1], torch.full_like(running[0], torch.nan), [3])
    assert mean.isfinite().all() and var.isfinite().all()
    assert (mean - batches[-1, 0]).abs().max() < 1


def by_formula(batches: Tensor, before: Tensor, now: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the next batch of one layer of at most 32 channels, a step at a time."""
    decay = 1 - 1 / torch.tensor(SPANS).double().view(-1, 1)
    sums, shares = torch.zeros(2, 6, batches.shape[2]).double(), torch.zeros(6, batches.shape[2]).double()
    products, weight = torch.zeros(2, 7, 7).double(), 0.0

    def log(statistics: Tensor) -> Tensor:
        return torch.stack([statistics[0], statistics[1].clamp(min=1e-12).log()])

    for batch, running, is_known in zip(batches, before, known, strict=True):
        seen = log(batch)
        learns = is_known & (shares[0] > 0) & (batch[1] >= EPS / 100) & (running[1] >= EPS / 100)
        errors = torch.cat([sums / shares.clamp(min=1e-300), log(running)[:, None]], 1) - seen[:, None]
        errors[0] /= seen[1].exp().sqrt()
        errors = torch.where(learns, errors, 0.0)
        kept = 0.9 if learns.any() else 1.0
        products, weight = kept * products + errors @ errors.mT, kept * weight + int(learns.sum())
        share = torch.where(is_known, decay, 1.0)
        sums = share * sums + torch.where(is_known, (1 - share) * seen[:, None], 0.0)
        shares = share * shares + torch.where(is_known, 1 - share, 0.0)
    candidates = torch.cat([sums / shares.clamp(min=1e-300), log(now)[:, None]], 1)
    found, off = [], []
    for product, values in zip(products / weight, candidates, strict=True):
        pull = product.diagonal().min().clamp(min=1e-12)
        best = torch.eye(7, dtype=torch.float64)[product.diagonal().argmin()]
        # the constrained minimum: w and the multiplier of sum w = 1
        system = torch.ones(8, 8, dtype=torch.float64)
        system[:7, :7], system[7, 7] = product + pull * torch.eye(7), 0
        w = torch.linalg.solve(system, torch.cat([pull * best, torch.ones(1, dtype=torch.float64)]))[:7]
        found.append(w @ values)
        off.append((w @ product @ w).sqrt())
    return torch.stack(found), torch.stack(off)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 32), min_size=1, max_size=3),
    steps=st.integers(4, 40),
    unknown=st.sampled_from(["nothing", "some steps", "some layers"]),
    dead=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_formula_layer_by_layer(sizes: list[int], steps: int, unknown: str, dead: bool, seed: int) -> None:
    channels = sum(sizes)
    batches, before = noisy(steps, channels, seed), noisy(steps, channels, seed + 100)
    coins = torch.rand(steps, len(sizes), generator=torch.Generator().manual_seed(seed)) < 0.6
    coins[:4] = True  # with fewer steps candidates are equal, and rounding chooses the best
    known = {"nothing": torch.ones_like(coins), "some steps": coins[:, :1].expand_as(coins), "some layers": coins}
    by_channel = known[unknown].repeat_interleave(torch.tensor(sizes), 1)
    if dead and min(sizes) > 1:
        batches[:, 1, 0], before[:, 1, -1] = 0.0, 1e-9
    now = noisy(1, channels, seed + 200)[0]
    found = forecast(batches, before, now, sizes, by_channel)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    for layer, (a, b) in enumerate(itertools.pairwise(starts)):
        part = slice(a, b)
        expected, error = by_formula(batches[..., part], before[..., part], now[:, part], by_channel[:, part])
        torch.testing.assert_close(found.mean[part], expected[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.var[part], expected[1].exp() * (1 + error[0] ** 2), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.error[:, layer], error, rtol=1e-6, atol=1e-8)


def test_wide_layers_are_fitted_on_evenly_spaced_channels_and_forecast_in_all() -> None:
    batches = noisy(32, 1) + torch.stack([torch.arange(500.0), torch.zeros(500)]).double()
    running = ema_of(batches)
    found = forecast(batches, running[:-1] + 0, running[-1], [500])
    assert (found.mean - batches[-1, 0]).abs().max() < 2 and found.mean.diff().min() > 0.5
