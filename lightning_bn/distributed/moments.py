"""Statistics over ranks: every rank enters the same collectives and ends with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.statistics.moments import Moments


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """Ranks that take part: 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """This process's place among the ranks: 0 without torch.distributed."""
    return dist.get_rank() if num_ranks() > 1 else 0


def sum_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """Whole numbers, each summed over all ranks."""
    if num_ranks() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.int64, device=on_backend(device))
    dist.all_reduce(total)
    return [int(v) for v in total.tolist()]


def max_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """Whole numbers, each the largest of all ranks'."""
    if num_ranks() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int64, device=on_backend(device))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [int(v) for v in largest.tolist()]


def merge_over_ranks(moments: Moments, group: dist.ProcessGroup | None = None) -> Moments:
    """Moments of what all ranks of ``group`` hold together; a rank may hold nothing.

    Two sums: one for the counts and the pooled mean, and, with that mean known, one for the squared deviations from it.
    """
    if num_ranks(group) == 1:
        return moments
    home = moments.mean.device
    count, mean, m2 = (
        v.expand_as(moments.mean).to(on_backend(home)) for v in (moments.count, moments.mean, moments.m2)
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
    gathered = own.new_empty(num_ranks(group), *own.shape)
    dist.all_gather(list(gathered), own, group=group)
    count, mean, m2 = gathered.unbind(1)
    total = count.sum(0)
    pooled = (count * mean).sum(0) / total.clamp(min=1)
    return Moments(total, pooled, m2.addcmul_(count, (mean - pooled).square_()).sum(0))


def of_first_rank(values: Tensor) -> Tensor:
    """What the first rank holds, on every rank; the others' ``values`` say shape and precision."""
    if num_ranks() == 1:
        return values
    shared = values.to(on_backend(values.device), copy=True)
    dist.broadcast(shared, src=0)
    return shared.to(values.device)


def on_backend(device: torch.device) -> torch.device:
    """A device whose tensors the ranks' backend takes: ``device`` where it does."""
    backend = dist.get_backend()
    if "nccl" in backend and "gloo" not in backend:
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")
