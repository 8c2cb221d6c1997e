"""As many samples as needed: standard errors are the spread of real repetitions, and a pass stops by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import PopulationStatistics, precise_bn
from tests.zoo import cnn, images


def layer() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3))


def samples(count: int) -> Tensor:
    """Of a skewed, a heavy-tailed and a normal population."""
    x = torch.randn(count, 3)
    return torch.stack([x[:, 0] + 0.3 * x[:, 0].square(), x[:, 1] * (1 + x[:, 1].abs()), 5 + 2 * x[:, 2]], 1)


def errors(statistics: PopulationStatistics) -> Tensor:
    """Standard errors of mean and variance, ``(2, C)``, as a pass tells them."""
    return torch.stack([statistics["0"].standard_error, statistics["0"].var_standard_error])


@pytest.mark.parametrize("kwargs", [{"normalization_batch_size": "loader"}, {"normalization_batch_size": 32}])
def test_standard_errors_are_the_spread_of_repetitions(kwargs: dict[str, Any]) -> None:
    means, variances, told = [], [], []
    for _ in range(120):
        statistics = precise_bn(layer(), samples(640).split([8, 24] * 20), **kwargs)
        means.append(statistics["0"].mean)
        variances.append(statistics["0"].var)
        told.append(errors(statistics).square())
    var = torch.stack(variances)
    real = torch.stack([torch.stack(means).std(0) / var.mean(0).sqrt(), var.std(0) / var.mean(0)])
    torch.testing.assert_close(torch.stack(told).mean(0).sqrt()[:, [0, 2]], real[:, [0, 2]], rtol=0.2, atol=0)
    torch.testing.assert_close(torch.stack(told).mean(0).sqrt(), real, rtol=0.3, atol=0)  # heavy tails are hard to know


def test_a_pass_stops_as_soon_as_every_layer_is_known_well_enough() -> None:
    used = []
    for tolerance in (0.2, 0.1, 0.05):
        seen: list[int] = []
        batches = (seen.append(1) or samples(16) for _ in range(2000))  # type: ignore[func-returns-value]
        statistics = precise_bn(layer(), batches, tolerance=tolerance, normalization_batch_size="loader")
        assert errors(statistics).square().mean(1).sqrt().max() < tolerance
        assert len(seen) == statistics.num_batches < 2000, "no batch is fetched that is not used"
        used.append(statistics.num_samples)
    assert used[0] < used[1] < used[2]


def test_the_worst_of_many_layers_decides_and_one_called_once_is_not_known() -> None:
    class Seldom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.seldom, self.calls = nn.BatchNorm2d(3), nn.BatchNorm2d(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.seldom(x) if self.calls % 40 == 1 else self.often(x)

    statistics = precise_bn(
        Seldom(), (torch.randn(8, 3, 8, 8) for _ in range(100)), tolerance=0.2, normalization_batch_size="loader"
    )
    assert statistics["seldom"].calls >= 2
    assert statistics.num_batches < 100


def test_eight_batches_are_the_least() -> None:
    statistics = precise_bn(layer(), (samples(4) for _ in range(100)), tolerance=1e6, normalization_batch_size="loader")
    assert statistics.num_batches == 8
    statistics = precise_bn(layer(), (samples(4) for _ in range(100)), tolerance=1e6, normalization_batch_size=8)
    assert (statistics.num_batches, statistics.batch_size) == (16, 8)


@pytest.mark.parametrize("batch_size", ["loader", 32])
def test_num_samples_and_the_batches_there_are_bound_it(batch_size: int | None) -> None:
    kwargs: dict[str, Any] = {"tolerance": 1e-9, "normalization_batch_size": batch_size}
    assert precise_bn(layer(), (samples(16) for _ in range(40)), num_samples=320, **kwargs).num_samples == 320
    assert precise_bn(layer(), (samples(16) for _ in range(40)), **kwargs).num_samples == 640


def test_a_channel_that_never_varies_does_not_matter() -> None:
    batches = (samples(32) * torch.tensor([1.0, 0.0, 1.0]) for _ in range(1000))
    assert precise_bn(layer(), batches, tolerance=0.1, normalization_batch_size="loader").num_batches < 1000


def test_a_population_has_no_spread() -> None:
    with pytest.raises(ValueError, match="'population' is a single one: leave one of them out"):
        precise_bn(cnn(), images(4), normalization_batch_size="population", tolerance=0.1)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"tolerance": 0}, ValueError, "tolerance must be above 0 but is 0"),
        ({"tolerance": -0.1}, ValueError, "tolerance must be above 0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be above 0"),
        ({"tolerance": True}, TypeError, "tolerance must be a number but is True"),
        ({"tolerance": "0.1"}, TypeError, "tolerance must be a number but is '0.1'"),
        ({"normalization_batch_size": 0}, ValueError, "normalization_batch_size must be at least 1 but is 0"),
        (
            {"normalization_batch_size": "all"},
            ValueError,
            "normalization_batch_size must be a number of samples, 'auto', 'loader'",
        ),
        ({"normalization_batch_size": 2.0}, TypeError, "normalization_batch_size must be a whole number"),
        ({"normalization_batch_size": True}, TypeError, "normalization_batch_size must be a whole number"),
        ({"memory_limit": 0}, ValueError, "memory_limit must be at least 1"),
        ({"memory_limit": 1e9}, TypeError, "memory_limit must be a whole number"),
    ],
)
def test_unusable_arguments_are_refused_before_a_batch_is_taken(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    batches = iter(images(4))
    with pytest.raises(error, match=message):
        precise_bn(cnn(), batches, **kwargs)
    assert len(list(batches)) == 1


def test_gaps_tell_whether_b_matters() -> None:
    model, x = cnn().double(), torch.cat(images(2, 2, 2, 2)).double()
    exact = precise_bn(model, x.split(2), normalization_batch_size="population")
    assert max(map(max, exact.gaps_to(precise_bn(model, [x], normalization_batch_size="loader")).values())) < 1e-9
    gaps = exact.gaps_to(precise_bn(model, x.split(2), normalization_batch_size="loader"))
    assert set(gaps) == {"1", "5"}
    assert max(gaps["1"]) < 1e-9, "the first layer's input is the same"
    assert min(gaps["5"]) > 1e-3
