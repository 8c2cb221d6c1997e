"""A normalization batch over several ranks is that of all their samples, and what goes wrong on one ends all."""

import copy
import warnings
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bn import precise_bn
from lightning_bn.functional.measure import MeasureConfig, measure
from lightning_bn.functional.precise import estimable_layers
from lightning_bn.lockstep.trial import ModelProfile
from tests.distributed.test_precise_bn_ranks import Batches, Case, measured_on_ranks
from tests.ranks import run_on_ranks
from tests.truth import assert_close_to, in_double
from tests.zoo import Shared, cnn, images

pytestmark = pytest.mark.ddp
POPULATION = {"normalization_batch_size": "population"}


def double(shards: list[list[int]]) -> list[Batches]:
    return [[x.double() for x in images(*sizes)] for sizes in shards]


def everything(shards: list[Batches]) -> Tensor:
    return torch.cat([x for shard in shards for x in shard])


SHARDS = [
    [[[2, 2], [2, 2]], [[5, 1], [2, 3]], [[2, 2, 2], [4]], [[4, 3], []], [[], [4, 3]]],  # of two ranks
    [[[3, 2], [1], [4, 1, 1], [2]], [[4, 4, 2], [], [3], []]],  # of four
]


@pytest.mark.parametrize("sizes", SHARDS)
def test_ranks_measure_all_their_samples_as_one_batch(sizes: list[list[list[int]]]) -> None:
    shards = [double(of_ranks) for of_ranks in sizes]
    models = [model.double() for model in (cnn(), Shared())]
    cases: list[Case] = [(*case, POPULATION) for case in product(models, shards, (False, True))]
    cases.append((nn.SyncBatchNorm.convert_sync_batchnorm(cnn()).double(), shards[0], False, POPULATION))
    for (model, shard, _, _), results in zip(cases, measured_on_ranks(cases), strict=True):
        statistics, _ = results[0]
        assert_close_to(statistics, in_double(model, [everything(shard)]), sigma=1e-10, var=1e-10)
        assert statistics.num_samples == statistics.batch_size == len(everything(shard))
        assert all(s.calls == (2 if name == "bn" else 1) for name, s in statistics.items())


def test_a_group_counts_the_samples_of_all_ranks() -> None:
    model, shards = cnn().double(), double([[2, 2, 2, 2], [1, 1, 1, 1]])
    together = [torch.cat([x for s in shards for x in s[i : i + 2]]) for i in (0, 2)]
    limits = (None, 1)
    cases: list[Case] = [
        (model, shards, False, {"normalization_batch_size": 6, "memory_limit": limit}) for limit in limits
    ]
    for limit, results in zip(limits, measured_on_ranks(cases), strict=True):
        assert_close_to(results[0][0], in_double(model, together), sigma=1e-10, var=1e-10)
        assert results[0][0].batch_size == 6
        assert bool(results[1][0].spilled) is (limit is not None)


def with_at_most(model: nn.Module, shards: list[Batches], share: float) -> tuple[float, list[str]]:
    profile = ModelProfile()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("lightning_bn.functional.joint._MEMORY_SHARE", share)
        layers, batches = estimable_layers(model), shards[dist.get_rank()]
        statistics = measure(layers, batches, model, MeasureConfig(), profile=profile)
    return statistics.batch_size, list(profile.warned)


@pytest.mark.parametrize(("share", "fits"), [(0.5, 6), (1e-12, 2)])
def test_ranks_agree_on_a_b_that_fits_on_all_of_them_even_without_batches(share: float, fits: int) -> None:
    for batch_size, warned in run_on_ranks(with_at_most, 2, cnn().eval(), [images(2, 2, 2), []], share):
        assert batch_size == fits and bool(warned) is (fits == 2)


class Trouble(Exception):
    pass


class Troubled(nn.Module):
    """Fails, or goes another way, at a batch of one rank."""

    def __init__(self, how: str, rank: int, samples: int) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.BatchNorm2d(3) for _ in range(3))
        self.how, self.rank, self.samples = how, rank, samples

    def forward(self, x: Tensor) -> Tensor:
        bad = dist.get_rank() == self.rank and len(x) == self.samples
        if self.how == "keeps":
            self.kept = x.mean()  # of the last one that came
        x = self.one(x)
        if bad and self.how == "error":
            raise Trouble("of rank 1")
        if self.how == "keeps" and dist.get_rank() == self.rank:
            x = x + 100 * self.kept
        if not (bad and self.how == "skips"):
            x = self.two(x)
        return x if bad and self.how == "ends" else self.three(x)


def ended(cases: list[tuple[nn.Module, dict[str, Any]]], shards: list[Batches]) -> list[tuple[str, str, bool]]:
    """How each pass ends on this rank, and whether it left the model as it was."""
    ends = []
    for model, kwargs in cases:
        before = copy.deepcopy(model.state_dict())
        try:
            precise_bn(DistributedDataParallel(model), shards[dist.get_rank()], **kwargs)
        except Exception as error:
            same = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
            ends.append((type(error).__name__, str(error), same))
    return ends


@pytest.mark.parametrize("shards", [[[3, 2], [3, 2]], [[3, 2], [2]], [[], [2, 3]], [[3], [2, 3]]])
def test_what_goes_wrong_on_one_rank_ends_all(shards: list[list[int]]) -> None:
    hows = ["error", "skips", "ends", *(["keeps"] if len(shards[1]) > 1 else [])]
    cases = [(Troubled(how, rank=1, samples=2), POPULATION) for how in hows]
    of_ranks = run_on_ranks(ended, 2, cases, [images(*sizes) for sizes in shards], timeout=60)
    first, second = of_ranks
    assert second[0] == ("Trouble", "of rank 1", True)
    assert first[0] == ("AnotherRankFailedError", "Another rank failed in the pass; its error says why.", True)
    for ends in of_ranks:
        assert len(ends) == len(hows), "each pass ended with an error on each rank"
        for kind, message, same in ends[1:]:
            assert kind == "LockstepError" and same, message


def test_ranks_that_take_different_ways_are_named() -> None:
    cases = [(Troubled("skips", 1, 2), POPULATION), (Troubled("ends", 1, 2), {"normalization_batch_size": 100})]
    for ends in run_on_ranks(ended, 2, cases, [images(2, 2), images(2, 2)], timeout=60):
        assert "at two on one and at three on another" in ends[0][1]
        assert "at three on one and at their end on another" in ends[1][1]


def short_of_memory(model: nn.Module, batches: Batches) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises((MemoryError, RuntimeError)) as error:
        patch.setattr("lightning_bn.lockstep.pooled.free_memory", lambda _: 10**9 if dist.get_rank() else 20_000)
        precise_bn(model, batches, **POPULATION)
    return error.typename


def test_a_rank_that_is_short_of_memory_ends_all() -> None:
    found = run_on_ranks(short_of_memory, 2, cnn(), images(4, 4, 4), timeout=60)
    assert found == ["NotEnoughMemoryError", "AnotherRankFailedError"]


def test_ranks_stop_together_at_a_tolerance() -> None:
    shards = [[torch.randn(4, 3, 8, 8) for _ in range(100)] for _ in range(2)]
    sizes = ("loader", 8)
    cases: list[Case] = [
        (cnn(), shards, False, {"tolerance": 0.05, "normalization_batch_size": size}) for size in sizes
    ]
    for results in measured_on_ranks(cases):
        assert 32 <= results[0][0].num_samples < 800
