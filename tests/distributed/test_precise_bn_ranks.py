"""PreciseBN on several ranks equals one process on all their data, with identical bits everywhere, and never hangs."""

import copy
import math
from collections.abc import Sequence
from itertools import product
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
Case = tuple[nn.Module, list[Batches], bool, dict[str, Any]]
"""Model, shards, whether DDP wraps the model, and arguments of `precise_bn`."""


def measured(model: nn.Module, shards: list[Batches], wrap: bool, kwargs: dict[str, Any]) -> Result:
    """Statistics of this rank's shard and the others', and what is then stored."""
    precise = DistributedDataParallel(model) if wrap else model
    statistics = precise_bn(precise, shards[dist.get_rank()], **{"normalization_batch_size": "loader", **kwargs})
    assert_stored(model, statistics)
    return statistics, model.state_dict()


def _each_measured(cases: list[Case]) -> list[Result]:
    return [measured(*case) for case in cases]


def measured_on_ranks(cases: list[Case]) -> list[list[Result]]:
    """For each case the results of all ranks, which have the same bits."""
    (world_size,) = {len(shards) for _, shards, _, _ in cases}
    results = list(zip(*run_on_ranks(_each_measured, world_size, cases), strict=True))
    for of_ranks in results:
        assert_same_bits(of_ranks)
    return results


def assert_same_bits(results: Sequence[Result]) -> None:
    first, stored = results[0]
    for statistics, others in results[1:]:
        assert list(statistics) == list(first)
        assert (statistics.num_samples, statistics.num_batches) == (first.num_samples, first.num_batches)
        for name in first:
            for a, b in zip(vars(statistics[name]).values(), vars(first[name]).values(), strict=True):
                same = torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if isinstance(a, Tensor) else a == b
                assert same  # of a single call no error is known: NaN
        assert all(torch.equal(others[key], value) for key, value in stored.items())


UNEVEN = {"batches": [[8, 8], [8, 3]], "number of batches": [[8, 8, 8], [4]]}
SHARDS = [
    [*UNEVEN.values(), [[8, 5], []]],  # of two ranks
    [[[8, 8, 2], [], [6], []]],  # of four
]


@pytest.mark.parametrize("sizes", SHARDS)
def test_ranks_measure_what_one_process_measures_on_all_data(sizes: list[list[list[int]]]) -> None:
    shards = [[images(*of_rank) for of_rank in of_ranks] for of_ranks in sizes]
    cases: list[Case] = [(*case, {}) for case in product((cnn(), Shared()), shards, (False, True))]
    for (model, of_ranks, _, _), results in zip(cases, measured_on_ranks(cases), strict=True):
        everything = [batch for shard in of_ranks for batch in shard]
        statistics, _ = results[0]
        assert_close_to(statistics, in_double(model, everything), sigma=2e-5, var=1e-4)
        assert statistics.num_samples == sum(map(len, everything)) and statistics.num_batches == len(everything)
        alone = precise_bn(copy.deepcopy(model), everything, normalization_batch_size="loader")
        for layer in alone:
            assert statistics[layer].calls == alone[layer].calls
            torch.testing.assert_close(statistics[layer].standard_error, alone[layer].standard_error, rtol=1e-4, atol=0)


def test_num_samples_counts_those_of_all_ranks() -> None:
    model, shards = cnn(), [images(4, 4, 4), images(4, 4)]
    rounds = {1: 1, 8: 1, 9: 2, 17: 3, 1000: 3}
    cases: list[Case] = [(model, shards, False, {"num_samples": number}) for number in rounds]
    for read, results in zip(rounds.values(), measured_on_ranks(cases), strict=True):
        truth = in_double(model, [batch for shard in shards for batch in shard[:read]])
        assert_close_to(results[0][0], truth, sigma=2e-5, var=1e-4)


class Branching(nn.Module):
    """Small batches take one layer, large ones the other; and one layer takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.neither = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.small(x) if len(x) < 5 else self.large(x)


def test_a_layer_reached_on_one_rank_only_is_estimated_on_all() -> None:
    shards = [images(4, 4), images(8, 8)]
    ((statistics, stored), _) = measured_on_ranks([(Branching(), shards, False, {})])[0]
    assert list(statistics) == ["small", "large"]
    for name, shard in zip(("small", "large"), shards, strict=True):
        assert_close_to({name: statistics[name]}, {name: torch.cat([rows_of(x) for x in shard])}, sigma=1e-5, var=1e-5)
    assert stored["neither.running_var"].eq(1).all() and stored["neither.running_mean"].eq(0).all()


def refusals(model: nn.Module, cases: list[list[Batches]]) -> list[tuple[str, bool]]:
    """For each case the error, and whether the model is as before."""
    found = []
    for shards in cases:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as error:
            precise_bn(model, shards[dist.get_rank()], normalization_batch_size="loader")
        untouched = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        found.append((str(error.value), untouched))
    return found


def with_bad_values(value: float) -> list[Batches]:
    shards = [images(4, 4), images(4)]
    for batch in (*shards[0], *shards[1]):
        batch[0, 0, 0, 0] = value
    return shards


def test_what_one_process_refuses_is_refused_on_all_ranks() -> None:
    nonfinite = "Layer '1' received non-finite values"
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(cnn())
    for model, cases in [
        (cnn(), {nonfinite: with_bad_values(math.nan), "No batch reached a BatchNorm layer of 1, 5": [[], []]}),
        (cnn(), {nonfinite: with_bad_values(math.inf)}),
        (synced, {"Only 1 of 2 ranks have a batch, and SyncBatchNorm layers": [images(4), []]}),
    ]:
        for of_rank in run_on_ranks(refusals, 2, model, list(cases.values()), timeout=60):
            for (message, untouched), expected in zip(of_rank, cases, strict=True):
                assert message.startswith(expected) and untouched


def measured_synced(model: nn.Module, shards: list[Batches]) -> tuple[Result, dict[str, list[tuple[Tensor, Tensor]]]]:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with recorded(model) as calls:
        result = measured(model, shards, False, {})
    return result, calls


@pytest.mark.parametrize("uneven", UNEVEN)
def test_synced_layers_normalize_with_the_statistics_of_all_ranks_batches(uneven: str) -> None:
    model = cnn()
    shards = [images(*sizes) for sizes in UNEVEN[uneven]]
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
