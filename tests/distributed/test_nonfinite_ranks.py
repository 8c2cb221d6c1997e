"""Batches with non-finite activations on some rank: the others count, and all ranks end with the same statistics."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_bn import precise_bn
from tests.distributed.test_precise_bn_ranks import Batches, Case, Result, assert_same_bits, measured_on_ranks
from tests.hand_written import ZOO, Net, batches, truth
from tests.ranks import run_on_ranks
from tests.truth import assert_close_to, in_double
from tests.zoo import cnn, images

pytestmark = [pytest.mark.ddp, pytest.mark.filterwarnings("ignore:.*left out of the statistics")]

BAD: dict[str, list[tuple[int, int]]] = {
    "one": [(1, 1)],
    "the first": [(1, 0)],
    "one of each rank": [(0, 2), (1, 0)],
    "all of one rank": [(1, 0), (1, 1), (1, 2)],
    "all of the first rank, and one": [(0, 0), (0, 1), (0, 2), (1, 1)],
}
"""Rank and number of the bad batches."""


def shards_with(bad: list[tuple[int, int]], value: float = math.nan) -> list[Batches]:
    shards = [[x.double() for x in images(4, 2, 3)] for _ in "12"]
    for rank, number in bad:
        shards[rank][number][0, 0, 0, 0] = value
    return shards


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_good_batches_of_all_ranks_count_and_the_left_out_are_counted(value: float) -> None:
    model = cnn().double()
    combined = list(product(BAD, ("loader", "population")))
    cases: list[Case] = [
        (model, shards_with(BAD[name], value), False, {"normalization_batch_size": size}) for name, size in combined
    ]
    for (name, size), (_, shards, _, _), results in zip(combined, cases, measured_on_ranks(cases), strict=True):
        good = [x for shard in shards for x in shard if x.isfinite().all()]
        statistics, _ = results[0]
        together = good if size == "loader" else [torch.cat(good)]
        assert_close_to(statistics, in_double(model, together), sigma=1e-10, var=1e-10)
        assert [s.left_out for s, _ in results] == [len(BAD[name])] * 2
        assert statistics.num_samples == sum(map(len, good)) and statistics.num_batches == len(good)


HAND_WRITTEN = ("by hand, by assignment", "own statistics, in place", "timm SplitBatchNorm2d")


def all_hand_written(cases: list[tuple[str, list[Batches], Any]]) -> list[Result]:
    torch.manual_seed(0)
    found = []
    for net, (_, shards, size) in [(Net(ZOO[case[0]]), case) for case in cases]:
        before = {k: v.clone() for k, v in net.state_dict().items() if "running_" not in k}
        statistics = precise_bn(net, shards[dist.get_rank()], normalization_batch_size=size)
        assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
        found.append((statistics, net.state_dict()))
    return found


def test_hand_written_layers_leave_the_same_out() -> None:
    shards = [batches([2, 2, 2]), batches([2, 2, 2])]
    shards[1][1][0, 0, 0] = math.nan
    cases = [(name, shards, size) for name in HAND_WRITTEN for size in ("loader", "population")]
    torch.manual_seed(0)
    nets = [Net(ZOO[name]) for name, _, _ in cases]
    results = run_on_ranks(all_hand_written, 2, cases)
    good = [*shards[0], shards[1][0], shards[1][2]]
    for number, (net, (_, _, size)) in enumerate(zip(nets, cases, strict=True)):
        of_ranks = [result[number] for result in results]
        assert_same_bits(of_ranks)
        expected = truth(net, [[x] for x in good] if size == "loader" else [good])
        assert_close_to(of_ranks[0][0], expected, sigma=1e-5, var=1e-5)
        assert [s.left_out for s, _ in of_ranks] == [1, 1]
