"""Rows exchanged among ranks: each goes to one place and comes home, and gradients are those of one process."""

from __future__ import annotations

import itertools
import os
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

counts_of = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(counts_of, st.integers(0, 2**32))
def test_every_row_is_sent_once_by_the_rank_that_has_it_to_a_place_of_its_own(counts: list[int], seed: int) -> None:
    """All ranks' routes at once, without ranks."""
    total, ranks = sum(counts), len(counts)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    routes = [Route.of(rank, counts, order) for rank in range(ranks)]
    rows = torch.arange(total).split(counts)
    moved = [torch.full((route.after,), -1) for route in routes]
    for (to, route), before in zip(enumerate(routes), rows, strict=True):
        assert route.before == len(before) and route.sent_sizes[to] == route.taken_sizes[to] == 0, "own rows stay"
        moved[to][route.kept_at] = before[route.kept]
        messages = [rows[r][other.sent].split(other.sent_sizes)[to] for r, other in enumerate(routes)]
        assert [len(message) for message in messages] == route.taken_sizes
        moved[to][route.taken_at] = torch.cat(messages)
    assert torch.equal(torch.cat(moved), order)
    sizes = [len(m) for m in moved]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


class Found(NamedTuple):
    """What one rank saw."""

    given: Tensor
    restored: list[bool]
    output: Tensor
    gradient: Tensor | None
    state: Tensor


def normalized(x: Tensor) -> Tensor:
    """What BatchNorm makes of rows, those of a rank: the gradient of each depends on all."""
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt()


def weights_for(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype) * (1 + x)


def exchanged(parts: list[Tensor], seed: int, without_history: bool) -> Found:
    """Features with gradients, and beside them rows of many types, in a structure."""
    own = parts[dist.get_rank()].clone()
    made_of_nothing = without_history and not len(own)
    x = own if made_of_nothing else own.requires_grad_()
    first = sum(len(p) for p in parts[: dist.get_rank()])
    ids = torch.arange(first, first + len(x))
    others = [ids % 2 == 0, ids.to(torch.bfloat16), ids.to(torch.uint8)[:, None], torch.zeros(len(x), 0), ids + 1j]
    generator = torch.Generator().manual_seed(seed)
    (features, rest), exchange = exchange_rows(((x, 3), {"ids": ids, "others": others}), generator)
    home = restore_rows((normalized(features[0]) if len(features[0]) else features[0], rest), exchange)
    output, rest_home = home
    same = [torch.equal(a, b) for a, b in zip([ids, *others], [rest_home["ids"], *rest_home["others"]], strict=True)]
    loss = (output * weights_for(output)).sum()
    if loss.requires_grad:  # no rank has rows with a history otherwise
        loss.backward()
    return Found(rest["ids"], same, output.detach(), x.grad, generator.get_state())


@pytest.mark.ddp
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_come_home_and_gradients_are_those_of_one_process(ranks: int) -> None:
    @settings(max_examples=30)
    @given(st.lists(st.integers(0, 7), min_size=ranks, max_size=ranks), st.integers(0, 2**32), st.booleans())
    def check(counts: list[int], seed: int, without_history: bool) -> None:
        x = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
        parts = list(x.detach().split(counts))
        found: list[Found] = run_on_ranks(exchanged, ranks, parts, seed, without_history)
        assert all(all(f.restored) for f in found), "not bit for bit what it was"
        sizes = [len(f.given) for f in found]
        assert torch.equal(torch.cat([f.given for f in found]).sort()[0], torch.arange(sum(counts)))
        if sum(counts) < 2 * ranks:
            assert sizes == counts, "rows moved though there are fewer than two a rank"
        else:
            assert max(sizes) - min(sizes) <= 1
        assert all(torch.equal(f.state, found[0].state) for f in found), "generators went apart"
        whole = x * 0
        for f in found:
            if len(f.given):
                whole = whole.index_put((f.given,), normalized(x[f.given]))
        torch.testing.assert_close(torch.cat([f.output for f in found]), whole.detach(), rtol=1e-12, atol=1e-12)
        (whole * weights_for(whole)).sum().backward()
        gradients = [torch.zeros(0, 3).double() if f.gradient is None else f.gradient for f in found]
        torch.testing.assert_close(torch.cat(gradients), x.grad, rtol=1e-10, atol=1e-10)

    check()


def orders(seeds: Iterable[int]) -> list[list[list[int]]]:
    """What this rank is given of 4 rows a rank, for each seed in three exchanges of one generator."""
    ids, generators = torch.arange(4) + 4 * dist.get_rank(), [torch.Generator().manual_seed(seed) for seed in seeds]
    return [[exchange_rows(ids, generator)[0].tolist() for _ in range(3)] for generator in generators]


@pytest.mark.ddp
def test_the_order_is_drawn_anew_each_time_and_the_same_from_the_same_seed() -> None:
    of_ranks = run_on_ranks(orders, 2, [0, *range(60)])
    for again, first, other, *_ in of_ranks:
        assert first == again != other
        assert len({tuple(order) for order in first}) == 3
    where = torch.zeros(8, 2)
    for rank, of_seeds in enumerate(of_ranks):
        for ids in itertools.chain.from_iterable(of_seeds[1:]):
            where[ids, rank] += 1
    assert (where.sum(1) == 180).all() and (where > 60).all(), "of 180 times each row is at each rank about 90 times"


def messages(sizes: list[int]) -> tuple[list[int], int, bool]:
    """Bytes that go through all-to-alls, of them those to itself, and whether a gradient was recorded unasked."""
    passed = []
    original = dist.all_to_all_single

    def counted(output: Tensor, input: Tensor, taken: list[int], sent: list[int], **kwargs: Any) -> Any:
        rank = dist.get_rank()
        passed.append((input.numel() * input.element_size(), sent[rank] + taken[rank]))
        return original(output, input, taken, sent, **kwargs)

    dist.all_to_all_single = counted
    try:
        x = torch.randn(sizes[dist.get_rank()], 10, requires_grad=True)
        generator = torch.Generator()
        structure, exchange = exchange_rows({"x": x, "y": x[:, :2].half(), "ids": torch.arange(len(x))}, generator)
        restore_rows(structure["x"] * 2, exchange).sum().backward()
        with torch.no_grad():
            momentum, exchange = exchange_rows(x, generator)
            plain = restore_rows(momentum, exchange)
        frozen, exchange = exchange_rows(x.detach(), generator)
        asked = frozen.requires_grad or plain.requires_grad or restore_rows(frozen, exchange).requires_grad
    finally:
        dist.all_to_all_single = original
    return [bytes for bytes, _ in passed], sum(own for _, own in passed), asked


@pytest.mark.ddp
def test_one_all_to_all_a_direction_moves_a_structure_and_no_row_that_stays() -> None:
    sizes = [40, 24]
    for (sent, to_itself, asked), rows in zip(run_on_ranks(messages, 2, sizes), sizes, strict=True):
        there, back, back_again, there_again, *without_gradients = sent
        assert len(without_gradients) == 4 and not asked, "without gradients there is no backward to wait in"
        assert to_itself == 0
        assert there % (40 + 4 + 8) == 0 and 0 < there < rows * (40 + 4 + 8)
        assert back % 40 == 0 and back_again % 40 == 0 and there_again % (40 + 4) == 0


def misfits() -> list[str]:
    """Errors, all of them on both ranks."""
    rank, said = dist.get_rank(), []
    cases: list[tuple[Any, int]] = [
        (torch.zeros(4, 3 + rank), 0),
        (torch.zeros(4, 3, dtype=torch.float64 if rank else torch.float32), 0),
        (torch.zeros(4, 3), rank),
        ((torch.zeros(4, 3), torch.zeros(3)), 0),
        ((torch.zeros(4, 3), object()), 0),
        (3, 0),
    ]
    for rows, seed in cases:
        with pytest.raises((ValueError, TypeError)) as error:
            exchange_rows(rows, torch.Generator().manual_seed(seed))
        said.append(str(error.value))
    x, exchange = exchange_rows(torch.zeros(4, 3), torch.Generator())
    for output in (x[1:], x.sum(), (x, "fine", object())):
        with pytest.raises((ValueError, TypeError)) as error:
            restore_rows(output, exchange)
        said.append(str(error.value))
    return said


@pytest.mark.ddp
def test_what_cannot_be_exchanged_is_an_error_on_every_rank_that_says_what() -> None:
    for said in run_on_ranks(misfits, 2):
        shape, dtype, seed, rows, strange, nothing, lost, summed, strange_output = said
        assert "Ranks hold rows of different dtype or shape" in shape and "different dtype" in dtype
        assert "generators are in different states" in seed
        assert "tensors of different numbers of rows: 3, 4" in rows and "was given a object" in strange
        assert "no tensor" in nothing and "numbers of rows: 3, 4" in lost
        assert "Tensor that is no tensor of rows" in summed and "restore_rows was given a object" in strange_output


class Pair(NamedTuple):
    x: Any
    y: Any


def places() -> list[str]:
    """What is said, on both ranks, of the same tensors at different places."""
    x, said, first = torch.zeros(4, 3), [], dist.get_rank() == 0
    for rows in (
        {"a": x, "b": x + 1} if first else {"b": x, "a": x + 1},
        (x, None) if first else (None, x),
        [Pair(x, None)] if first else [Pair(None, x)],
    ):
        with pytest.raises(ValueError, match="at other places of a structure") as error:
            exchange_rows(rows, torch.Generator().manual_seed(0))
        said.append(str(error.value))
    return said


@pytest.mark.ddp
def test_rows_at_other_places_of_a_structure_are_not_mixed() -> None:
    first, second = run_on_ranks(places, 2)
    assert [said.split("this one ")[1].split(" torch")[0] for said in first] == ["['a']", "[0]", "[0].x"]
    assert [said.split("this one ")[1].split(" torch")[0] for said in second] == ["['b']", "[1]", "[0].y"]


def lists() -> None:
    x, seed = torch.randn(4, 3), torch.Generator().manual_seed
    for hidden in ([1, 2, 3, 4], ("a", "b", "c", "d"), list(torch.zeros(4)), [(1, "a")] * 4, [{"id": 1.0}] * 4):
        for rows in ((x, hidden), {"x": x, "deep": [{"ids": hidden}]}):
            with pytest.raises(TypeError, match=r"exchange_rows was given a (list|tuple) of 4 things"):
                exchange_rows(rows, seed(0))
    plain = (x, 4, "mode", [1, 2, 3], [None] * 4, torch.Size([4, 3, 2, 1]), torch.zeros(()))
    (_, *same), exchange = exchange_rows(plain, seed(0))
    assert same == list(plain[1:])
    with pytest.raises(TypeError, match="restore_rows was given a list of 4 things"):
        restore_rows((x, x[:, 0].tolist()), exchange)
    exchange_rows((x[:2], (224, 224)), seed(0))  # a size, though there are two rows
    exchange_rows((x[:2], 3), seed(0))


@pytest.mark.ddp
def test_rows_do_not_hide_in_lists_of_plain_values() -> None:
    run_on_ranks(lists, 2)


@pytest.mark.parametrize("generator", [None, 0, False, "gen"])
def test_a_generator_that_is_none_is_refused_by_one_process_too(generator: Any) -> None:
    with pytest.raises(TypeError, match=f"generator must be a torch.Generator on the CPU but is {generator!r}"):
        exchange_rows(torch.zeros(4, 3), generator)


def last_words(at: str) -> None:
    """Rank 1 is killed, and rank 0 says in which step it has an error."""
    x, generator = torch.randn(5, 3, requires_grad=True), torch.Generator()
    group = dist.new_group([0, 1])
    for step in itertools.count():
        if dist.get_rank() == 1 and (step, at) == (2, "forward"):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            rows, exchange = exchange_rows(x, generator, group)
            output = restore_rows(rows * 2, exchange)
            if dist.get_rank() == 1 and (step, at) == (2, "backward"):
                os.kill(os.getpid(), signal.SIGKILL)
            output.sum().backward()
        except RuntimeError as error:
            raise RuntimeError(f"step {step} failed") from error
    raise AssertionError


@pytest.mark.ddp
@pytest.mark.parametrize("at", ["forward", "backward"])
def test_a_killed_rank_ends_the_others_with_an_error(at: str) -> None:
    """At once, not when the group has waited for a rank that is only late."""
    with pytest.raises(RuntimeError, match=r"(?s)rank 0: .*step 2 failed.*rank 1: died") as raised:
        run_on_ranks(last_words, 2, at)
    assert "timed out" not in str(raised.value).lower()


def test_one_process_keeps_its_rows() -> None:
    x, generator = torch.randn(3, 2), torch.Generator()
    state = generator.get_state()
    rows, exchange = exchange_rows(x, generator)
    assert rows is x and restore_rows(rows, exchange) is x and torch.equal(generator.get_state(), state)
