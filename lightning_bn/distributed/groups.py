"""Groups of ranks: the first k, the next k and so on, each rank in one; made once and shared by all who need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist

from lightning_bn.distributed.moments import num_ranks

_GROUPS: dict[tuple[dist.ProcessGroup, int], list[dist.ProcessGroup]] = {}
"""By what all ranks form (another object once torch.distributed was started anew) and size: this rank's group, listed
once for each of its users."""


def borrow_group(size: int) -> tuple[dist.ProcessGroup | None, Callable[[], Any]]:
    """This rank's group of ``size`` ranks of neighbouring numbers, and what gives it back.

    Every rank calls this, and as often as the others: all ranks together make all groups. The last to give one back
    destroys it. All ranks together are no new group (None without torch.distributed).

    Raises:
        ValueError: If the ranks cannot be divided into groups of ``size``.
    """
    everyone = dist.group.WORLD
    if num_ranks() % size:
        raise ValueError(
            f"ranks={size}, but there are {num_ranks()} ranks in all: they divide into groups of {size} only if their "
            f"number is a multiple of {size}."
        )
    if everyone is None or size == num_ranks():
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
    group = cast(dist.ProcessGroup, dist.new_group(list(range(num_ranks()))))

    def destroy() -> None:
        if dist.group.WORLD is everyone:
            dist.destroy_process_group(group)

    return group, destroy
