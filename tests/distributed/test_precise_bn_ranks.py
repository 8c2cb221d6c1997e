"""PreciseBN on several ranks equals one process on all their data, with identical bits everywhere, and never hangs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bn import PopulationStatistics, find_bn, precise_bn
from tests.ranks import run_on_ranks
from tests.truth import assert_close_to, assert_stored, in_double, recorded, rows_of
from tests.zoo import Shared, cnn, images

pytestmark = pytest.mark.ddp

Batches = list[Tensor]
Result = tuple[PopulationStatistics, dict[str, Tensor]]


def measured(model: nn.Module, shards: list[Batches], wrap: bool, kwargs: dict[str, Any]) -> Result:
    """Statistics of this rank's shard and the others', and what is then stored."""
    precise = DistributedDataParallel(model) if wrap else model
    statistics = precise_bn(precise, shards[dist.get_rank()], **{"normalization_batch_size": "loader", **kwargs})
    assert_stored(model, statistics)
    return statistics, model.state_dict()


def assert_same_bits(results: list[Result]) -> None:
    first, stored = results[0]
    for statistics, others in results[1:]:
        assert list(statistics) == list(first)
        assert (statistics.num_samples, statistics.num_batches) == (first.num_samples, first.num_batches)
        for name in first:
            for a, b in zip(vars(statistics[name]).values(), vars(first[name]).values(), strict=True):
                same = torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if isinstance(a, Tensor) else a == b
                assert same  # of a single call no error is known: NaN
        assert all(torch.equal(others[key], value) for key, value in stored.items())


SHARDS = {
    "uneven batches": [[8, 8], [8, 3]],
    "an uneven number of batches": [[8, 8, 8], [4]],
    "a rank without batches": [[8, 5], []],
    "four ranks, two without": [[8, 8, 2], [], [6], []],
}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", SHARDS)
def test_ranks_measure_what_one_process_measures_on_all_data(name: str, wrap: bool) -> None:
    model = cnn()
    shards = [images(*sizes) for sizes in SHARDS[name]]
    everything = [batch for shard in shards for batch in shard]
    truth = in_double(model, everything)
    results = run_on_ranks(measured, len(shards), model, shards, wrap, {})
    assert_same_bits(results)
    statistics, _ = results[0]
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)
    assert statistics.num_samples == sum(map(len, everything)) and statistics.num_batches == len(everything)
    alone = precise_bn(model, everything, normalization_batch_size="loader")
    for layer in alone:
        assert statistics[layer].calls == alone[layer].calls
        torch.testing.assert_close(statistics[layer].standard_error, alone[layer].standard_error, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("num_samples", "rounds"), [(1, 1), (8, 1), (9, 2), (17, 3), (1000, 3)])
def test_num_samples_counts_those_of_all_ranks(num_samples: int, rounds: int) -> None:
    model, shards = cnn(), [images(4, 4, 4), images(4, 4)]
    truth = in_double(model, [batch for shard in shards for batch in shard[:rounds]])
    results = run_on_ranks(measured, 2, model, shards, False, {"num_samples": num_samples})
    assert_same_bits(results)
    assert_close_to(results[0][0], truth, sigma=2e-5, var=1e-4)


class Branching(nn.Module):
    """Small batches take one layer, large ones the other; and one layer takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.neither = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.small(x) if len(x) < 5 else self.large(x)


def test_a_layer_reached_on_one_rank_only_is_estimated_on_all() -> None:
    model, shards = Branching(), [images(4, 4), images(8, 8)]
    results = run_on_ranks(measured, 2, model, shards, False, {})
    assert_same_bits(results)
    statistics, stored = results[0]
    assert list(statistics) == ["small", "large"]
    for name, shard in zip(("small", "large"), shards, strict=True):
        assert_close_to({name: statistics[name]}, {name: torch.cat([rows_of(x) for x in shard])}, sigma=1e-5, var=1e-5)
    assert stored["neither.running_var"].eq(1).all() and stored["neither.running_mean"].eq(0).all()


def test_a_layer_called_several_times_is_merged_call_by_call() -> None:
    model, shards = Shared(), [images(8, 4), images(3)]
    truth = in_double(model, [*shards[0], *shards[1]])
    results = run_on_ranks(measured, 2, model, shards, False, {})
    assert_same_bits(results)
    assert results[0][0]["bn"].calls == 6
    assert_close_to(results[0][0], truth, sigma=2e-5, var=1e-4)


def refused(model: nn.Module, shards: list[Batches]) -> tuple[str, bool]:
    before = copy.deepcopy(model.state_dict())
    try:
        precise_bn(model, shards[dist.get_rank()], normalization_batch_size="loader")
    except ValueError as error:
        return str(error), all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return "", False


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_in_all_batches_are_refused_on_all(bad: float) -> None:
    shards = [images(4, 4), images(4)]
    for batch in (*shards[0], *shards[1]):
        batch[0, 0, 0, 0] = bad
    for message, untouched in run_on_ranks(refused, 2, cnn(), shards):
        assert message.startswith("Layer '1' received non-finite values") and untouched


def test_no_batches_on_any_rank_are_refused_on_all() -> None:
    for message, untouched in run_on_ranks(refused, 2, cnn(), [[], []]):
        assert message.startswith("No batch reached a BatchNorm layer of 1, 5") and untouched


# --- SyncBatchNorm ----------------------------------------------------------------------------------------------------


def measured_synced(model: nn.Module, shards: list[Batches]) -> tuple[Result, dict[str, list[tuple[Tensor, Tensor]]]]:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with recorded(model) as calls:
        result = measured(model, shards, False, {})
    return result, calls


@pytest.mark.parametrize("name", ["uneven batches", "an uneven number of batches"])
def test_synced_layers_normalize_with_the_statistics_of_all_ranks_batches(name: str) -> None:
    model = cnn()
    shards = [images(*sizes) for sizes in SHARDS[name]]
    steps = [torch.cat([s[i] for s in shards if len(s) > i]) for i in range(max(map(len, shards)))]
    truth = in_double(model, steps)  # one process, each step's batches concatenated
    oracle = copy.deepcopy(model)
    with recorded(oracle) as expected:
        precise_bn(oracle, steps, normalization_batch_size="loader")

    results = run_on_ranks(measured_synced, 2, model, shards)
    assert_same_bits([result for result, _ in results])
    assert_close_to(results[0][0][0], truth, sigma=2e-5, var=1e-4)
    for layer in find_bn(model):
        for i, (_, together) in enumerate(expected[layer]):
            outputs = [calls[layer][i][1] for (_, calls), s in zip(results, shards, strict=True) if len(s) > i]
            torch.testing.assert_close(torch.cat(outputs), together, rtol=1e-4, atol=1e-4)


def refused_synced(model: nn.Module, shards: list[Batches]) -> tuple[str, bool]:
    return refused(nn.SyncBatchNorm.convert_sync_batchnorm(model), shards)


def test_synced_layers_without_company_are_refused_on_all_ranks_before_anything_hangs() -> None:
    for message, untouched in run_on_ranks(refused_synced, 2, cnn(), [images(4), []]):
        assert message.startswith("Only 1 of 2 ranks have a batch, and SyncBatchNorm layers") and untouched
