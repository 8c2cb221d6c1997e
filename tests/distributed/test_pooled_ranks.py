"""A normalization batch over several ranks is that of all their samples, and what goes wrong on one ends all."""

from __future__ import annotations

import copy
import warnings
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
from tests.distributed.test_precise_bn_ranks import Batches, Result, assert_same_bits, measured
from tests.ranks import run_on_ranks
from tests.truth import assert_close_to, in_double
from tests.zoo import Shared, cnn, images

pytestmark = pytest.mark.ddp


def double(shards: list[list[int]]) -> list[Batches]:
    return [[x.double() for x in images(*sizes)] for sizes in shards]


def everything(shards: list[Batches]) -> Tensor:
    return torch.cat([x for shard in shards for x in shard])


def several(cases: list[tuple[nn.Module, list[Batches], bool, dict[str, Any]]]) -> list[Result]:
    return [measured(*case) for case in cases]


SHARDS = {
    "even": [[2, 2], [2, 2]],
    "uneven batches": [[5, 1], [2, 3]],
    "an uneven number of batches": [[2, 2, 2], [4]],
    "a rank without batches": [[4, 3], []],
    "the first rank without batches": [[], [4, 3]],
}
FOUR = {"four ranks": [[3, 2], [1], [4, 1, 1], [2]], "four ranks, two without": [[4, 4, 2], [], [3], []]}


@pytest.mark.parametrize(("world_size", "sizes"), [(2, SHARDS), (4, FOUR)])
def test_ranks_measure_all_their_samples_as_one_batch(world_size: int, sizes: dict[str, list[list[int]]]) -> None:
    shards = [double(s) for s in sizes.values()]
    models = [model.double() for model in (cnn(), Shared())]
    cases = [
        (m, s, wrap, {"normalization_batch_size": "population"})
        for m in models
        for s in shards
        for wrap in (False, True)
    ]
    results = run_on_ranks(several, world_size, cases)
    for number, (model, shard, _, _) in enumerate(cases):
        of_ranks = [result[number] for result in results]
        assert_same_bits(of_ranks)
        statistics, _ = of_ranks[0]
        truth = in_double(model, [everything(shard)])
        assert_close_to(statistics, truth, sigma=1e-10, var=1e-10)
        assert statistics.num_samples == statistics.batch_size == len(everything(shard))
        assert all(s.calls == (2 if name == "bn" else 1) for name, s in statistics.items())


@pytest.mark.parametrize("memory_limit", [None, 1])
def test_a_group_counts_the_samples_of_all_ranks(memory_limit: int | None) -> None:
    model, shards = cnn().double(), double([[2, 2, 2, 2], [1, 1, 1, 1]])
    together = [torch.cat([x for s in shards for x in s[i : i + 2]]) for i in (0, 2)]
    results = run_on_ranks(
        measured, 2, model, shards, False, {"normalization_batch_size": 6, "memory_limit": memory_limit}
    )
    assert_same_bits(results)
    assert_close_to(results[0][0], in_double(model, together), sigma=1e-10, var=1e-10)
    assert results[0][0].batch_size == 6
    assert bool(results[1][0].spilled) is (memory_limit is not None)


def synced(model: nn.Module, shards: list[Batches]) -> Result:
    return measured(
        nn.SyncBatchNorm.convert_sync_batchnorm(model), shards, False, {"normalization_batch_size": "population"}
    )


def test_synced_layers_are_layers_like_others() -> None:
    model, shards = cnn().double(), double([[2, 2], [3]])
    results = run_on_ranks(synced, 2, model, shards)
    assert_same_bits(results)
    assert_close_to(results[0][0], in_double(model, [everything(shards)]), sigma=1e-10, var=1e-10)


def with_at_most(model: nn.Module, shards: list[Batches], share: float) -> tuple[float, list[str]]:
    profile = ModelProfile()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("lightning_bn.functional.joint._MEMORY_SHARE", share)
        layers, batches = estimable_layers(model), shards[dist.get_rank()]
        statistics = measure(layers, batches, model, MeasureConfig(), profile=profile)
    return statistics.batch_size, list(profile.warned)


@pytest.mark.parametrize("share", [0.5, 1e-12])
def test_ranks_agree_on_a_b_that_fits_on_all_of_them_even_without_batches(share: float) -> None:
    results = run_on_ranks(with_at_most, 2, cnn().eval(), [images(2, 2, 2), []], share)
    for batch_size, said in results:
        assert batch_size == (6 if share == 0.5 else 2) and bool(said) is (share < 0.5)


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Trouble(Exception):
    pass


class Troubled(nn.Module):
    """Fails, or goes another way, where it is told to."""

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
    kwargs = {"normalization_batch_size": "population"}
    cases = [(Troubled(how, rank=1, samples=2), kwargs) for how in hows]
    of_ranks = run_on_ranks(ended, 2, cases, [images(*sizes) for sizes in shards], timeout=60)
    first, second = of_ranks
    assert len(first) == len(second) == len(hows), "each pass ended with an error on each rank"
    assert all(same for ends in of_ranks for _, _, same in ends)
    assert second[0][:2] == ("Trouble", "of rank 1")
    assert first[0][:2] == ("AnotherRankFailedError", "Another rank failed in the pass; its error says why.")
    for ends in of_ranks:
        for kind, message, _ in ends[1:]:
            assert kind == "LockstepError", message


def test_ranks_that_take_different_ways_are_named() -> None:
    cases = [
        (Troubled("skips", 1, 2), {"normalization_batch_size": "population"}),
        (Troubled("ends", 1, 2), {"normalization_batch_size": 100}),
    ]
    for ends in run_on_ranks(ended, 2, cases, [images(2, 2), images(2, 2)], timeout=60):
        assert "at two on one and at three on another" in ends[0][1]
        assert "at three on one and at their end on another" in ends[1][1]


def short_of_memory(model: nn.Module, shards: list[Batches]) -> tuple[str, str]:
    from lightning_bn.lockstep import pooled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooled, "free_memory", lambda device: 10**9 if dist.get_rank() else 20_000)
        try:
            precise_bn(model, shards[dist.get_rank()], normalization_batch_size="population")
        except (MemoryError, RuntimeError) as error:
            return type(error).__name__, str(error)
    return "", ""


def test_a_rank_that_is_short_of_memory_ends_all() -> None:
    first, second = run_on_ranks(short_of_memory, 2, cnn(), [images(4, 4, 4), images(4, 4, 4)], timeout=60)
    assert first[0] == "NotEnoughMemoryError" and second[0] == "AnotherRankFailedError"


# --- as many samples as needed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", ["loader", 8])
def test_ranks_stop_together(batch_size: int | None) -> None:
    model = cnn()
    shards = [[torch.randn(4, 3, 8, 8) for _ in range(100)] for _ in range(2)]
    results = run_on_ranks(
        measured, 2, model, shards, False, {"tolerance": 0.05, "normalization_batch_size": batch_size}
    )
    assert_same_bits(results)
    assert 32 <= results[0][0].num_samples < 800
