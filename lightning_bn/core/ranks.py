"""Collectives: every rank calls each of these functions, and gets the same result.

Without torch.distributed there is one rank. An error on one rank must reach all others, so that none waits forever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.core.moments import Moments, merge_rows

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # never caught: the next steps would fail as well


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    """Return this rank, 0 without torch.distributed."""
    return dist.get_rank() if get_world_size() > 1 else 0


def collective_device(device: torch.device) -> torch.device:
    """Return a device that the backend supports: ``device`` if it does."""
    backend = dist.get_backend()
    if "nccl" in backend and "gloo" not in backend:
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def sum_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """Sum each integer over all ranks."""
    return list(values) if get_world_size() == 1 else _reduce(values, device, dist.ReduceOp.SUM)


def max_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """Take the maximum of each integer over all ranks."""
    return list(values) if get_world_size() == 1 else _reduce(values, device, dist.ReduceOp.MAX)


def _reduce(values: Sequence[int], device: torch.device, op: dist.ReduceOp.RedOpType) -> list[int]:
    reduced = torch.tensor(values, dtype=torch.int64, device=collective_device(device))
    dist.all_reduce(reduced, op=op)
    return [int(v) for v in reduced.tolist()]


def broadcast_from_rank_zero(values: Tensor) -> Tensor:
    """Return rank 0's values; those of the other ranks only give shape and dtype."""
    if get_world_size() == 1:
        return values
    shared = values.to(collective_device(values.device), copy=True)
    dist.broadcast(shared, src=0)
    return shared.to(values.device)


def gather_rows(own: Tensor) -> Tensor:
    """Concatenate the rows ``(n, ...)`` of all ranks in the order of ranks; ``n`` may differ, and be 0."""
    if get_world_size() == 1:
        return own
    sizes = sum_over_ranks([len(own) * (rank == get_rank()) for rank in range(get_world_size())], own.device)
    # a sum with zeros: exact, the same bits on every rank, and no padding
    rows = torch.zeros(sum(sizes), *own.shape[1:], dtype=own.dtype, device=collective_device(own.device))
    first = sum(sizes[: get_rank()])
    rows[first : first + len(own)] = own
    dist.all_reduce(rows)
    return rows.to(own.device)


def merge_over_ranks(moments: Moments, group: dist.ProcessGroup | None = None) -> Moments:
    """Merge the moments of all ranks by two sums: counts and means, then squared deviations from the pooled mean."""
    if get_world_size(group) == 1:
        return moments
    device = moments.mean.device
    count, mean, m2 = (
        v.expand_as(moments.mean).to(collective_device(device)) for v in (moments.count, moments.mean, moments.m2)
    )
    first = torch.stack([count, count * mean])
    dist.all_reduce(first, group=group)
    total, pooled = first[0], first[1] / first[0].clamp(min=1)
    second = m2 + count * (mean - pooled).square()
    dist.all_reduce(second, group=group)
    return Moments(*(v.to(device) for v in (total, pooled, second)))


def merge_at_once(moments: Moments, group: dist.ProcessGroup | None = None) -> Moments:
    """Merge the moments of all ranks in one all-gather, for a single layer, where latency dominates."""
    own, channels = torch.cat([moments.count.flatten()[:1], moments.mean, moments.m2]), len(moments.mean)
    gathered = own.new_empty(get_world_size(group) * len(own))
    dist.all_gather_into_tensor(gathered, own, group=group)
    count, mean, m2 = gathered.view(-1, len(own)).split([1, channels, channels], 1)
    return merge_rows(count, mean, m2)


class AnotherRankFailedError(RuntimeError):
    """Signals that another rank failed in a joint computation; that rank's error gives the cause."""

    def __init__(self) -> None:
        super().__init__("Another rank failed in the pass; its error says why.")


@contextmanager
def agreed(device: torch.device) -> Iterator[None]:
    """Raise on every rank if the body raises on any: its own error, or `AnotherRankFailedError`.

    The body must contain no collective that a rank with an error would not reach.
    """
    error: Exception | None = None
    try:
        yield
    except OUT_OF_MEMORY:
        raise
    except Exception as caught:
        error = caught
    failed, *_ = sum_over_ranks([error is not None], device)
    if error is not None:
        raise error
    if failed:
        raise AnotherRankFailedError


# world group (another object after a restart of torch.distributed) and size -> this rank's group, once per user
_GROUPS: dict[tuple[dist.ProcessGroup, int], list[dist.ProcessGroup]] = {}


def acquire_group(size: int) -> tuple[dist.ProcessGroup | None, Callable[[], Any]]:
    """Return this rank's group of ``size`` consecutive ranks, and a function that releases it."""
    world = dist.group.WORLD
    if get_world_size() % size:
        raise ValueError(
            f"group_size={size}, but there are {get_world_size()} ranks: group_size must divide the number of ranks."
        )
    # all ranks together need no new group
    if world is None or size == get_world_size():
        return world, lambda: None
    users = _GROUPS.setdefault((world, size), [])
    group = users[0] if users else dist.new_subgroups(size)[0]
    users.append(group)

    def release() -> None:
        users.pop()
        if not users:
            del _GROUPS[world, size]
            _destroy(group, world)

    return group, release


def own_group() -> tuple[dist.ProcessGroup | None, Callable[[], Any]]:
    """Return a new group of all ranks, whose collectives never mix with others', and a function that destroys it."""
    world = dist.group.WORLD
    if world is None:
        return None, lambda: None
    group = cast(dist.ProcessGroup, dist.new_group(list(range(get_world_size()))))
    return group, lambda: _destroy(group, world)


def _destroy(group: dist.ProcessGroup, world: dist.ProcessGroup) -> None:
    if dist.group.WORLD is world:  # else torch.distributed was stopped, and the group with it
        dist.destroy_process_group(group)
