"""The tests' own runner of ranks: a rank that fails or hangs fails the test, and says so."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks

pytestmark = pytest.mark.ddp


def sum_of_ranks(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("here")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_every_rank_returns_its_result() -> None:
    assert run_on_ranks(sum_of_ranks, 2, 10) == [21, 21]


def test_a_rank_that_raises_fails_the_run_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1: .*\n[^$]*ValueError: here"):
        run_on_ranks(fail_on_rank_1, 2)


def test_a_rank_that_dies_fails_the_run() -> None:
    with pytest.raises(RuntimeError, match="rank 1: died"):
        run_on_ranks(die_on_rank_1, 2)


def test_a_rank_that_hangs_is_killed() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1: nothing in time"):
        run_on_ranks(hang_on_rank_1, 2, timeout=4)
    assert time.monotonic() - start < 30
