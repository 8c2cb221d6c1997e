"""Rows exchanged among ranks: each is sent once and returns, and gradients are those of one process."""

import itertools
import os
import re
import signal
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_bn import exchange_rows, restore_rows
from lightning_bn.core.exchange import Route
from tests.ranks import run_on_ranks


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 2**32))
def test_routes_send_every_row_once_and_fill_every_index(counts: list[int], seed: int) -> None:
    order = torch.randperm(sum(counts), generator=seeded(seed))
    routes = [Route.of(rank, counts, order) for rank in range(len(counts))]
    rows = torch.arange(sum(counts)).split(counts)
    moved = []
    for to, route in enumerate(routes):
        messages = [rows[r][other.sent].split(other.sent_sizes)[to] for r, other in enumerate(routes)]
        assert [len(message) for message in messages] == route.received_sizes
        moved.append(torch.full((len(route.received_at),), -1))
        moved[to][route.received_at] = torch.cat(messages)
        assert torch.equal(route.inverse().received_at.sort()[0], torch.arange(counts[to]))
    assert torch.equal(torch.cat(moved), order)
    sizes = [len(m) for m in moved]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


class Result(NamedTuple):
    ids: Tensor
    restored: list[bool]
    output: Tensor
    gradient: Tensor | None
    state: Tensor


def normalized(x: Tensor) -> Tensor:
    """BatchNorm of a rank's rows: the gradient of each depends on all."""
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt()


def weights_for(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype) * (1 + x)


def exchanged(parts: list[Tensor], seed: int, without_history: bool) -> Result:
    own = parts[dist.get_rank()].clone()
    x = own if without_history and not len(own) else own.requires_grad_()
    first = sum(len(p) for p in parts[: dist.get_rank()])
    ids = torch.arange(first, first + len(x))
    others = [ids % 2 == 0, ids.to(torch.bfloat16), ids.to(torch.uint8)[:, None], torch.zeros(len(x), 0), ids + 1j]
    generator = seeded(seed)
    structure = ((x, 3), {"ids": ids, "others": others})
    (features, rest), exchange = exchange_rows(structure, generator=generator)
    computed = normalized(features[0]) if len(features[0]) else features[0]
    output, restored = restore_rows((computed, rest), exchange=exchange)
    same = [torch.equal(a, b) for a, b in zip([ids, *others], [restored["ids"], *restored["others"]], strict=True)]
    loss = (output * weights_for(output)).sum()
    if loss.requires_grad:  # else no rank has rows with a history
        loss.backward()
    return Result(rest["ids"], same, output.detach(), x.grad, generator.get_state())


@pytest.mark.ddp
def test_rows_return_and_gradients_are_those_of_one_process() -> None:
    ranks = 4  # with two, a route is its own inverse

    @settings(max_examples=12)
    @given(st.lists(st.integers(0, 7), min_size=ranks, max_size=ranks), st.integers(0, 2**32), st.booleans())
    def check(counts: list[int], seed: int, without_history: bool) -> None:
        x = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
        results: list[Result] = run_on_ranks(exchanged, ranks, list(x.detach().split(counts)), seed, without_history)
        assert all(all(r.restored) for r in results), "not bit for bit"
        sizes = [len(r.ids) for r in results]
        assert torch.equal(torch.cat([r.ids for r in results]).sort()[0], torch.arange(sum(counts)))
        if sum(counts) < 2 * ranks:
            assert sizes == counts, "rows moved though there are fewer than two per rank"
        else:
            assert max(sizes) - min(sizes) <= 1
        assert all(torch.equal(r.state, results[0].state) for r in results), "generators diverged"
        whole = x * 0
        for r in results:
            if len(r.ids):
                whole = whole.index_put((r.ids,), normalized(x[r.ids]))
        torch.testing.assert_close(torch.cat([r.output for r in results]), whole.detach(), rtol=1e-12, atol=1e-12)
        (whole * weights_for(whole)).sum().backward()
        gradients = [torch.zeros(0, 3).double() if r.gradient is None else r.gradient for r in results]
        torch.testing.assert_close(torch.cat(gradients), x.grad, rtol=1e-10, atol=1e-10)

    check()


def orders(seeds: Iterable[int]) -> list[list[list[int]]]:
    """This rank's rows of three exchanges of 4 rows per rank, for each seed."""
    ids, generators = torch.arange(4) + 4 * dist.get_rank(), [seeded(seed) for seed in seeds]
    return [[exchange_rows(ids, generator=generator)[0].tolist() for _ in range(3)] for generator in generators]


@pytest.mark.ddp
def test_the_order_changes_each_time_and_is_the_same_for_the_same_seed() -> None:
    counts = torch.zeros(8, 2)
    for rank, (again, first, other, *more) in enumerate(run_on_ranks(orders, 2, [0, *range(40)])):
        assert first == again != other
        assert len({tuple(order) for order in first}) == 3
        for ids in itertools.chain(first, other, *more):
            counts[ids, rank] += 1
    assert (counts.sum(1) == 120).all() and (counts > 35).all(), "of 120 times each row is on each rank about 60 times"


class Pair(NamedTuple):
    x: Any
    y: Any


def refusals() -> None:
    rank, x = dist.get_rank(), torch.zeros(4, 3)
    restored, exchange = exchange_rows(x, generator=seeded(0))
    exchanged: list[tuple[Any, int, str]] = [
        (torch.zeros(4, 3 + rank), 0, "Ranks hold rows of different dtype or shape"),
        (torch.zeros(4, 3, dtype=torch.float64 if rank else torch.float32), 0, "different dtype"),
        (x, rank, "generators are in different states"),
        ((x, torch.zeros(3)), 0, "tensors of different numbers of rows: 3, 4"),
        ((x, object()), 0, "was given a object"),
        (3, 0, "no tensor"),
        ({"b": x, "a": x + 1} if rank else {"a": x, "b": x + 1}, 0, f"this one ['{'ab'[rank]}'] torch.float32"),
        ((None, x) if rank else (x, None), 0, f"this one [{rank}] torch.float32"),
        ([Pair(None, x)] if rank else [Pair(x, None)], 0, f"this one [0].{'xy'[rank]} torch.float32"),
    ]
    for per_row in ([1, 2, 3, 4], ("a", "b", "c", "d"), list(torch.zeros(4)), [(1, "a")] * 4, [{"id": 1.0}] * 4):
        words = f"exchange_rows was given a {type(per_row).__name__} of 4 things"
        exchanged += [((x, per_row), 0, words), ({"x": x, "deep": [{"ids": per_row}]}, 0, words)]
    for rows, seed, words in exchanged:
        with pytest.raises((ValueError, TypeError), match=re.escape(words)):
            exchange_rows(rows, generator=seeded(seed))
    for output, words in [
        (restored[1:], "numbers of rows: 3, 4"),
        (restored.sum(), "Tensor that is no tensor of rows"),
        ((restored, "fine", object()), "restore_rows was given a object"),
        ((x, x[:, 0].tolist()), "restore_rows was given a list of 4 things"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            restore_rows(output, exchange=exchange)
    plain = (x, 4, "mode", [1, 2, 3], [None] * 4, torch.Size([4, 3, 2, 1]), torch.zeros(()))
    (_, *same), _ = exchange_rows(plain, generator=seeded(0))
    assert same == list(plain[1:])
    exchange_rows((x[:2], (224, 224)), generator=seeded(0))  # a size, though there are two rows
    exchange_rows((x[:2], 3), generator=seeded(0))


@pytest.mark.ddp
def test_what_cannot_be_exchanged_is_an_error_on_every_rank() -> None:
    run_on_ranks(refusals, 2)


def kill_rank_1(at: str) -> None:
    """Rank 1 is killed, and rank 0 raises with the step in which it gets an error."""
    x, generator = torch.randn(5, 3, requires_grad=True), torch.Generator()
    group = dist.new_group([0, 1])
    for step in itertools.count():
        if dist.get_rank() == 1 and (step, at) == (2, "forward"):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            rows, exchange = exchange_rows(x, generator=generator, group=group)
            output = restore_rows(rows * 2, exchange=exchange)
            if dist.get_rank() == 1 and (step, at) == (2, "backward"):
                os.kill(os.getpid(), signal.SIGKILL)
            output.sum().backward()
        except RuntimeError as error:
            raise RuntimeError(f"step {step} failed") from error
    raise AssertionError


@pytest.mark.ddp
@pytest.mark.parametrize("at", ["forward", "backward"])
def test_a_killed_rank_ends_the_others_with_an_error(at: str) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0: .*step 2 failed.*rank 1: died") as raised:
        run_on_ranks(kill_rank_1, 2, at)
    assert "timed out" not in str(raised.value).lower()


def test_one_process_keeps_its_rows_and_refuses_another_object_than_a_generator() -> None:
    x, generator = torch.randn(3, 2), torch.Generator()
    state = generator.get_state()
    rows, exchange = exchange_rows(x, generator=generator)
    assert rows is x and restore_rows(rows, exchange=exchange) is x and torch.equal(generator.get_state(), state)
    for other in (None, 0, False, "gen"):
        with pytest.raises(TypeError, match=f"generator must be a torch.Generator on the CPU but is {other!r}"):
            exchange_rows(x, generator=other)  # type: ignore[arg-type]
