"""What ranks hold is merged to the same bits on every one of them, whether or not a rank holds anything."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_bn import DeadChannels, MeanGap, Moments, NonFiniteChannels, VarGap
from lightning_bn.core.ranks import get_rank, get_world_size, merge_at_once, merge_over_ranks, sum_over_ranks
from tests.ranks import run_on_ranks


def moments_of(x: Tensor, cuts: list[int]) -> tuple[list[Moments], list[int], tuple[int, int]]:
    """Merged moments of the rows of ``x``, each rank holding its part of them, merged in both ways."""
    part = x.tensor_split(cuts)[get_rank()]
    own = Moments.of(part) if len(part) else Moments.empty(x.shape[1])
    return (
        [merge_over_ranks(own), merge_at_once(own)],
        sum_over_ranks([len(part), 1], torch.device("cpu")),
        (get_rank(), get_world_size()),
    )


@pytest.mark.ddp
@pytest.mark.parametrize("cuts", [[7], [0], [5, 5, 29]])
def test_ranks_hold_one_population(cuts: list[int]) -> None:
    x = torch.randn(40, 3, dtype=torch.float64) + torch.tensor([0.0, 1.0, 1e4])
    results = run_on_ranks(moments_of, len(cuts) + 1, x, cuts)
    for rank, (ways, sums, place) in enumerate(results):
        assert place == (rank, len(results)) and sums == [40, len(results)]
        for merged, on_rank_0 in zip(ways, results[0][0], strict=True):
            assert (merged.count == 40).all()
            torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(merged.m2, x.var(0, correction=0) * 40, rtol=1e-11, atol=0)
            for ours, first in zip(vars(merged).values(), vars(on_rank_0).values(), strict=True):
                assert torch.equal(ours, first), "identical bits on every rank"


def moments_in_a_group() -> list[float]:
    """Ranks 0 and 2 form a group of their own; rank 1 stays out."""
    group = dist.new_group([0, 2])
    if get_rank() == 1:
        return []
    x = torch.full((get_rank() + 1, 1), float(get_rank()))
    return [v.item() for v in vars(merge_over_ranks(Moments.of(x), group)).values()]


@pytest.mark.ddp
def test_a_group_of_ranks_merges_among_itself() -> None:
    first, out, last = run_on_ranks(moments_in_a_group, 3)
    assert out == [] and first == last == [4, 1.5, 3]


def test_without_ranks_there_is_nothing_to_merge() -> None:
    assert not dist.is_initialized() and get_world_size() == 1 and get_rank() == 0
    moments = Moments.of(torch.randn(4, 2))
    assert merge_over_ranks(moments) is moments
    assert sum_over_ranks([3, 4], torch.device("cpu")) == [3, 4]


def updates_of(rank: int) -> list[list[Tensor]]:
    """Batch mean and variance, running mean and variance; rank 1 has one update more, and a dead channel."""
    own = torch.Generator().manual_seed(rank)
    updates = [list(torch.rand(4, 3, dtype=torch.float64, generator=own) + 0.1) for _ in range(2 + rank)]
    for _, var, _, _ in updates if rank else ():
        var[0] = 0
    return updates


def gaps(updates: list[list[Tensor]]) -> dict[str, float]:
    parts = {part: MeanGap(3, part=part) for part in ("gap", "lag", "noise")}
    metrics = MetricCollection({**parts, "var": VarGap(3), "dead": DeadChannels(), "bad": NonFiniteChannels(3)})
    for update in updates:
        metrics.update(*update)
    return {name: value.item() for name, value in metrics.compute().items()}


def gaps_on_rank() -> dict[str, float]:
    return gaps(updates_of(dist.get_rank()))


@pytest.mark.ddp
def test_gap_metrics_are_those_of_one_process_with_all_ranks_updates() -> None:
    first, second = run_on_ranks(gaps_on_rank, 2)
    assert first == second == pytest.approx(gaps(updates_of(0) + updates_of(1)), rel=1e-12)
    assert first["dead"] == pytest.approx(3 / 15)
