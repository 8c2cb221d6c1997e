"""Statistics over ranks: every rank enters the same collectives and ends with the same numbers.

Errors over ranks: what one rank meets, all know of, so that none is left alone in a collective.

Rows of all ranks, one rank's after the other's, on every rank.

Groups of ranks: the first k, the next k and so on, each rank in one; made once and shared by all who need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.core.moments import Moments


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks that take part: 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    """This process's place among the ranks: 0 without torch.distributed."""
    return dist.get_rank() if get_world_size() > 1 else 0


def sum_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """Whole numbers, each summed over all ranks."""
    if get_world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.int64, device=collective_device(device))
    dist.all_reduce(total)
    return [int(v) for v in total.tolist()]


def max_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """Whole numbers, each the largest of all ranks'."""
    if get_world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int64, device=collective_device(device))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [int(v) for v in largest.tolist()]


def merge_over_ranks(moments: Moments, group: dist.ProcessGroup | None = None) -> Moments:
    """Moments of what all ranks of ``group`` hold together; a rank may hold nothing.

    Two sums: one for the counts and the pooled mean, and, with that mean known, one for the squared deviations from it.
    """
    if get_world_size(group) == 1:
        return moments
    home = moments.mean.device
    count, mean, m2 = (
        v.expand_as(moments.mean).to(collective_device(home)) for v in (moments.count, moments.mean, moments.m2)
    )
    first = torch.stack([count, count * mean])
    dist.all_reduce(first, group=group)
    total, pooled = first[0], first[1] / first[0].clamp(min=1)
    second = m2 + count * (mean - pooled).square()
    dist.all_reduce(second, group=group)
    return Moments(*(v.to(home) for v in (total, pooled, second)))


def merge_at_once(moments: Moments, group: dist.ProcessGroup | None = None) -> Moments:
    """What `merge_over_ranks` gives, in one exchange of as many bytes as there are ranks.

    For one layer, where it is the number of exchanges that takes time.
    """
    own = torch.stack([moments.count.expand_as(moments.mean), moments.mean, moments.m2])
    gathered = own.new_empty(get_world_size(group), *own.shape)
    dist.all_gather(list(gathered), own, group=group)
    count, mean, m2 = gathered.unbind(1)
    total = count.sum(0)
    pooled = (count * mean).sum(0) / total.clamp(min=1)
    return Moments(total, pooled, m2.addcmul_(count, (mean - pooled).square_()).sum(0))


def broadcast_from_rank_zero(values: Tensor) -> Tensor:
    """What the first rank holds, on every rank; the others' ``values`` say shape and precision."""
    if get_world_size() == 1:
        return values
    shared = values.to(collective_device(values.device), copy=True)
    dist.broadcast(shared, src=0)
    return shared.to(values.device)


def collective_device(device: torch.device) -> torch.device:
    """A device whose tensors the ranks' backend takes: ``device`` where it does."""
    backend = dist.get_backend()
    if "nccl" in backend and "gloo" not in backend:
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Not ours to swallow, as `KeyboardInterrupt` and `SystemExit` are not: what comes next would fail as well."""


class AnotherRankFailedError(RuntimeError):
    """Another rank failed in something that all ranks do together."""

    def __init__(self) -> None:
        super().__init__("Another rank failed in the pass; its error says why.")


@contextmanager
def agreed(device: torch.device) -> Iterator[None]:
    """Raise on every rank if one has met an error in here: its own on that rank, word of it on the others.

    There must be no collective in here that a rank with an error would not enter.

    Args:
        device: Of the model.

    Raises:
        AnotherRankFailedError: If only others have met one.
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


def gather_rows(own: Tensor) -> Tensor:
    """Rows ``(n, ...)`` of all ranks in the order of ranks; ``n`` may differ, and be zero.

    A sum of zeros but for the own rows: exact, the same bits everywhere, and no rank has to pad.
    """
    if get_world_size() == 1:
        return own
    sizes = sum_over_ranks([len(own) * (rank == get_rank()) for rank in range(get_world_size())], own.device)
    rows = torch.zeros(sum(sizes), *own.shape[1:], dtype=own.dtype, device=collective_device(own.device))
    first = sum(sizes[: get_rank()])
    rows[first : first + len(own)] = own
    dist.all_reduce(rows)
    return rows.to(own.device)


_GROUPS: dict[tuple[dist.ProcessGroup, int], list[dist.ProcessGroup]] = {}
"""By what all ranks form (another object once torch.distributed was started anew) and size: this rank's group, listed
once for each of its users."""


def acquire_group(size: int) -> tuple[dist.ProcessGroup | None, Callable[[], Any]]:
    """This rank's group of ``size`` ranks of neighboring numbers, and what gives it back.

    Every rank calls this, and as often as the others: all ranks together make all groups. The last to give one back
    destroys it. All ranks together are no new group (None without torch.distributed).

    Raises:
        ValueError: If the ranks cannot be divided into groups of ``size``.
    """
    everyone = dist.group.WORLD
    if get_world_size() % size:
        raise ValueError(
            f"group_size={size}, but there are {get_world_size()} ranks in all: they divide into groups of {size} only if "
            f"their number is a multiple of {size}."
        )
    if everyone is None or size == get_world_size():
        return everyone, lambda: None
    users = _GROUPS.setdefault((everyone, size), [])
    group = users[0] if users else dist.new_subgroups(size)[0]
    users.append(group)

    def give_back() -> None:
        users.pop()
        if not users:
            del _GROUPS[everyone, size]
            if dist.group.WORLD is everyone:  # else torch.distributed was stopped, and the group with it
                dist.destroy_process_group(group)

    return group, give_back


def own_group() -> tuple[dist.ProcessGroup | None, Callable[[], Any]]:
    """A group of all ranks for one user alone, whose collectives never mix with others', and what destroys it.

    Every rank calls this. None without torch.distributed.
    """
    everyone = dist.group.WORLD
    if everyone is None:
        return None, lambda: None
    group = cast(dist.ProcessGroup, dist.new_group(list(range(get_world_size()))))

    def destroy() -> None:
        if dist.group.WORLD is everyone:
            dist.destroy_process_group(group)

    return group, destroy
