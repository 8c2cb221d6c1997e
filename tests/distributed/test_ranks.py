"""The tests' own runner of ranks: a rank that fails or hangs fails the test with its error."""

import os
import random
import time
import warnings
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks

pytestmark = pytest.mark.ddp


def fail_on_rank_1(how: str) -> None:
    if dist.get_rank() == 0:
        return dist.barrier() if how == "raises" else None
    if how == "raises":
        raise ValueError("here")
    if how == "dies":
        os._exit(3)
    time.sleep(60)


def processes_of_ranks() -> set[int]:
    return set(run_on_ranks(os.getpid, 2))


@pytest.mark.parametrize(
    ("how", "error", "timeout"),
    [
        ("raises", r"rank 1: .*\n[^$]*ValueError: here", 120),
        ("dies", "rank 1: died", 120),
        ("hangs", "rank 1: nothing in time", 2),
    ],
)
def test_a_rank_that_fails_fails_the_run_and_the_next_call_has_new_ones(how: str, error: str, timeout: float) -> None:
    before = processes_of_ranks()
    with pytest.raises(RuntimeError, match=error):
        run_on_ranks(fail_on_rank_1, 2, how, timeout=timeout)
    assert len(before) == 2 and not any(psutil.pid_exists(pid) for pid in before)
    assert not before & processes_of_ranks()


def change_everything() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    warnings.simplefilter("error")
    dist.new_group()


def state() -> tuple[Any, ...]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("once", stacklevel=1)
    groups = len(dist.distributed_c10d._world.pg_names)
    torch_state = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.rand(()).item()
    strict = torch.are_deterministic_algorithms_enabled()
    return os.environ.get("LEFT_BEHIND"), strict, random.random(), len(caught), groups, *torch_state


def test_ranks_stay_and_every_call_has_the_same_global_state() -> None:
    before, processes = run_on_ranks(state, 2), processes_of_ranks()
    run_on_ranks(change_everything, 2)
    assert run_on_ranks(state, 2) == before
    assert processes_of_ranks() == processes
