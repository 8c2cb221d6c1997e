"""Forecasts on made-up traces, whose truth is known, against what the EMA and single averages make of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_bn.tracking.forecast import SPANS, RidgeForecaster

CHANNELS = 32
EPS = 1e-5


class Trace:
    """Steps of one layer: the mean of every channel follows ``path`` with its own sign and size, in batches of noise.

    Attributes:
        errors: Of the forecasts, of the EMA and of the last batch, about the truth of the next step: sigma, rms.
    """

    def __init__(self, path: Callable[[int], float], noise: float, steps: int, seed: int = 0, momentum: float = 0.1):
        generator = torch.Generator().manual_seed(seed)
        self.scale = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
        self.forecaster = RidgeForecaster([CHANNELS], torch.full((CHANNELS,), EPS, dtype=torch.float64))
        self.running = torch.stack([torch.zeros(CHANNELS), torch.ones(CHANNELS)]).double()
        self.errors: list[tuple[float, float, float]] = []
        for step in range(steps):
            batch = torch.stack([self.scale * path(step), torch.ones(CHANNELS, dtype=torch.float64)])
            batch[0] += noise * torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
            self.forecaster.update(batch[None], self.running[None], torch.ones(1, CHANNELS, dtype=torch.bool))
            self.running = (1 - momentum) * self.running + momentum * batch
            truth = self.scale * path(step + 1)
            found = self.forecaster.forecast(self.running).mean, self.running[0], batch[0]
            a, b, c = (float((f - truth).square().mean().sqrt()) for f in found)
            self.errors.append((a, b, c))

    def after(self, step: int) -> Tensor:
        """Errors of forecast, EMA and last batch from that step on: rms."""
        return torch.tensor(self.errors[step:]).square().mean(0).sqrt()


def test_of_constant_statistics_the_noise_is_averaged_away() -> None:
    forecast, ema, last = Trace(lambda step: 0.0, noise=0.1, steps=200).after(60)
    assert forecast < 1.05 * ema
    assert forecast < 0.3 * last


def test_a_steady_drift_is_followed_without_lag() -> None:
    forecast, ema, last = Trace(lambda step: 0.05 * step, noise=0.0, steps=100).after(20)
    assert ema > 0.3
    assert forecast < 0.005 < last


def test_an_oscillation_is_followed_where_every_average_lags() -> None:
    forecast, ema, last = Trace(lambda step: math.sin(2 * math.pi * step / 12), noise=0.01, steps=150).after(40)
    assert forecast < 0.75 * last < 0.75 * ema


def test_after_a_drop_of_the_learning_rate_the_drift_is_soon_forgotten() -> None:
    trace = Trace(lambda step: 0.1 * min(step, 60), noise=0.05, steps=120)
    forecast, ema, last = trace.after(75)
    assert forecast < 0.8 * last
    assert forecast < ema
    overshoot = max(f for f, _, _ in trace.errors[60:75])
    assert overshoot < 0.3, "about three steps' drift"


@pytest.mark.parametrize("drift", [0.0, 0.001, 0.01, 0.1])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_it_is_nowhere_worse_than_the_ema(drift: float, noise: float, momentum: float) -> None:
    """On random walks, from hardly any drift to hardly any noise."""
    walk = torch.cumsum(drift * torch.randn(301, generator=torch.Generator().manual_seed(1)), 0).tolist()
    forecast, ema, last = Trace(walk.__getitem__, noise, steps=300, momentum=momentum).after(50)
    assert forecast < (1.05 if momentum == 0.1 else 1.25) * ema  # ten steps hardly tell 32 steps' average from 199's
    assert forecast < 1.1 * last


def test_the_variance_is_that_of_the_population_with_that_of_the_batches_means() -> None:
    """Batches of 16 rows that share half of their variance, as the pixels of an image do: Eq. 2."""
    generator = torch.Generator().manual_seed(0)
    forecaster = RidgeForecaster([CHANNELS], torch.full((CHANNELS,), EPS, dtype=torch.float64))
    running = torch.stack([torch.zeros(CHANNELS), torch.ones(CHANNELS)]).double()
    forecasts = []
    for _ in range(300):
        shared = torch.randn(4, 1, CHANNELS, generator=generator, dtype=torch.float64)
        own = torch.randn(4, 64, CHANNELS, generator=generator, dtype=torch.float64)
        rows = ((shared + own) / 2**0.5).flatten(0, 1)  # variance 1, of which means of batches have 1/8
        batch = torch.stack([rows.mean(0), rows.var(0)])
        forecaster.update(batch[None], running[None], torch.ones(1, CHANNELS, dtype=torch.bool))
        running = 0.9 * running + 0.1 * batch
        forecasts.append(forecaster.forecast(running).var)
    forecast, ema = torch.stack(forecasts[100:]).mean(), running[1].mean()
    assert abs(forecast - 1) < 0.04
    assert abs(ema - 1) > 0.08, "which leaves the variance of means out"


def test_without_a_past_it_is_the_running_statistics() -> None:
    forecaster = RidgeForecaster([2], torch.full((2,), EPS, dtype=torch.float64))
    running = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    for _ in range(2):
        mean, var, error = forecaster.forecast(running)
        assert torch.equal(torch.stack([mean, var]), running)
        assert error.isnan().all()
        forecaster.update(torch.ones(1, 2, 2, dtype=torch.float64), running[None], torch.tensor([[True, True]]))
    assert not forecaster.forecast(running).error.isnan().any()


def noisy(steps: int, channels: int, seed: int = 0) -> Tensor:
    """Batches of drifting means and variances, ``(steps, 2, C)``."""
    generator = torch.Generator().manual_seed(seed)
    walk = 0.1 * torch.randn(steps, 2, channels, generator=generator, dtype=torch.float64).cumsum(0)
    return torch.stack([walk[:, 0], walk[:, 1].exp()], 1)


def forecast_of(batches: Tensor, sizes: list[int], counted: Tensor | None = None) -> tuple[RidgeForecaster, Tensor]:
    channels = batches.shape[2]
    forecaster = RidgeForecaster(sizes, torch.full((channels,), EPS, dtype=torch.float64))
    running = torch.stack([torch.zeros(channels), torch.ones(channels)]).double()
    for step, batch in enumerate(batches):
        on = torch.ones(channels, dtype=torch.bool) if counted is None else counted[step]
        forecaster.update(batch[None], running[None], on[None])
        running = torch.where(on, 0.9 * running + 0.1 * batch, running)
    return forecaster, running


def both(pair: tuple[RidgeForecaster, Tensor]) -> Tensor:
    mean, var, _ = pair[0].forecast(pair[1])
    return torch.stack([mean, var])


def test_layers_side_by_side_do_not_touch_one_another() -> None:
    batches = noisy(30, 8)
    together = both(forecast_of(batches, [3, 5]))
    apart = torch.cat([both(forecast_of(part, [part.shape[2]])) for part in batches.split([3, 5], 2)], 1)
    assert torch.allclose(together, apart, rtol=1e-12, atol=0)


def test_a_dead_channel_teaches_the_others_nothing() -> None:
    batches = noisy(30, 4)
    wild = torch.stack([torch.randn(30, 1), torch.zeros(30, 1)], 1).double()  # no variance, a mean that jumps about
    with_it = both(forecast_of(torch.cat([batches, wild], 2), [5]))
    assert with_it.isfinite().all()
    started = forecast_of(torch.cat([batches, wild], 2)[1:], [5])  # its running variance needs a while to die
    assert (both(started)[:, :4] - both(forecast_of(batches[1:], [4]))).abs().max() < 0.2


def test_steps_in_which_a_layer_was_not_called_change_nothing() -> None:
    batches = noisy(40, 3)
    counted = (torch.arange(40) % 4 != 0)[:, None].expand(40, 3)
    assert torch.equal(both(forecast_of(batches, [3], counted)), both(forecast_of(batches[counted[:, 0]], [3])))


def test_a_nan_batch_is_left_out_and_poisoned_running_statistics_as_well() -> None:
    batches = noisy(30, 3)
    forecaster, running = forecast_of(batches, [3])
    before = forecaster.state_dict()
    poison = torch.full((1, 2, 3), torch.nan, dtype=torch.float64)
    forecaster.update(poison, running[None], torch.ones(1, 3, dtype=torch.bool))
    assert all(torch.equal(before[name], value) for name, value in forecaster.state_dict().items())
    mean, var, _ = forecaster.forecast(torch.full_like(running, torch.nan))
    assert mean.isfinite().all() and var.isfinite().all()
    assert (mean - batches[-1, 0]).abs().max() < 1


def test_its_state_is_all_there_is_to_it() -> None:
    batches = noisy(30, 5)
    whole, running = forecast_of(batches, [2, 3])
    resumed = RidgeForecaster([2, 3], torch.full((5,), EPS, dtype=torch.float64))
    resumed.load_state_dict(forecast_of(batches[:15], [2, 3])[0].state_dict())
    again = forecast_of(batches[:15], [2, 3])[1]
    for batch in batches[15:]:
        resumed.update(batch[None], again[None], torch.ones(1, 5, dtype=torch.bool))
        again = 0.9 * again + 0.1 * batch
    assert torch.equal(both((resumed, again)), both((whole, running)))


def test_the_state_of_other_layers_is_refused_and_nothing_taken() -> None:
    forecaster = forecast_of(noisy(5, 5), [2, 3])[0]
    before = forecaster.state_dict()
    with pytest.raises(ValueError, match="the layers were others"):
        forecaster.load_state_dict(forecast_of(noisy(5, 5), [5])[0].state_dict())
    assert all(torch.equal(before[name], value) for name, value in forecaster.state_dict().items())


def test_memory_is_what_is_said() -> None:
    kept = forecast_of(noisy(2, 1000), [1000])[0].state_dict()
    assert sum(value.numel() for value in kept.values()) < 13.2 * 1000
    assert len(SPANS) == 6


# --------------------------------------------------------------------------------------------- many steps at once
class Stepwise:
    """The formula as it is written, a step at a time: sums that weigh, and what their weights add up to."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.decay = 1 - 1 / torch.tensor(SPANS).double().view(-1, 1)
        self.sums, self.shares = torch.zeros(2, 6, sum(sizes)).double(), torch.zeros(6, sum(sizes)).double()
        self.products, self.weight = torch.zeros(2, len(sizes), 7, 7).double(), torch.zeros(len(sizes)).double()

    def update(self, batch: Tensor, running: Tensor, counted: Tensor) -> None:
        counted = counted & (batch.isfinite() & running.isfinite()).all(0)
        seen, before = (torch.stack([s[0], s[1].clamp(min=1e-12).log()]) for s in (batch, running))
        taught = counted & (self.shares[0] > 0) & (batch[1] >= EPS / 100) & (running[1] >= EPS / 100)
        errors = torch.cat([self.averages(), before[:, None]], 1) - seen[:, None]
        errors[0] /= seen[1].exp().sqrt()
        errors = torch.where(taught, errors, 0.0)
        for layer, part in enumerate(errors.split(self.sizes, -1)):
            channels = taught.split(self.sizes)[layer].sum()
            kept = 0.9 if channels else 1.0
            self.products[:, layer] = kept * self.products[:, layer] + torch.einsum("skc,sjc->skj", part, part)
            self.weight[layer] = kept * self.weight[layer] + channels
        decay = torch.where(counted, self.decay, 1.0)
        self.sums = decay * self.sums + torch.where(counted, (1 - decay) * seen[:, None], 0.0)
        self.shares = decay * self.shares + (1 - decay)

    def averages(self) -> Tensor:
        return self.sums / self.shares.clamp(min=1e-300)


def assert_equal_to_rounding(found: dict[str, Tensor], truth: Stepwise) -> None:
    torch.testing.assert_close(found["averages"], truth.averages(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found["products"], truth.products, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found["weight"], truth.weight, rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    blocks=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    uncounted=st.sampled_from(["nothing", "some steps", "some layers", "some channels", "all"]),
    oddities=st.booleans(),
    seed=st.integers(0, 99),
)
def test_many_steps_at_once_are_what_they_are_one_by_one(
    sizes: list[int], blocks: list[int], uncounted: str, oddities: bool, seed: int
) -> None:
    """Whatever was not counted, and where; dead channels and such of NaN among them."""
    steps, channels = sum(blocks), sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    batches, running = noisy(steps, channels, seed), noisy(steps, channels, seed + 100)
    coins = torch.rand(steps, channels, generator=generator) < 0.6
    layer_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    counted = {
        "nothing": torch.ones_like(coins),
        "some steps": coins[:, :1].expand_as(coins),
        "some layers": coins[:, layer_of],
        "some channels": coins,
        "all": torch.zeros_like(coins),
    }[uncounted]
    if oddities:
        batches[::3, 1, 0] = 0.0
        running[::4, 1, -1] = 1e-9
        batches[::5, 0, -1] = torch.nan
        running[::7, 1, 0] = torch.inf
    truth = Stepwise(sizes)
    for step in range(steps):
        truth.update(batches[step], running[step], counted[step])
    forecaster = RidgeForecaster(sizes, torch.full((channels,), EPS, dtype=torch.float64))
    for block in zip(*(each.split(blocks) for each in (batches, running, counted)), strict=True):
        forecaster.update(*block)
    assert_equal_to_rounding(forecaster.state_dict(), truth)


def test_layers_may_be_taken_in_some_at_a_time() -> None:
    batches, running = noisy(50, 9), noisy(50, 9, seed=1)
    counted, truth = torch.ones(50, 9, dtype=torch.bool), Stepwise([2, 3, 4])
    for step in range(50):
        truth.update(batches[step], running[step], counted[step])
    forecaster = RidgeForecaster([2, 3, 4], torch.full((9,), EPS, dtype=torch.float64))
    for layers, channels in ((slice(2, 3), slice(5, 9)), (slice(0, 2), slice(0, 5))):
        forecaster.update(batches[..., channels], running[..., channels], counted[:, channels], layers)
    assert_equal_to_rounding(forecaster.state_dict(), truth)
