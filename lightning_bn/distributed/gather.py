"""Rows of all ranks, one rank's after the other's, on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.distributed.moments import num_ranks, on_backend, own_rank, sum_over_ranks


def gather_rows(own: Tensor) -> Tensor:
    """Rows ``(n, ...)`` of all ranks in the order of ranks; ``n`` may differ, and be zero.

    A sum of zeros but for the own rows: exact, the same bits everywhere, and no rank has to pad.
    """
    if num_ranks() == 1:
        return own
    sizes = sum_over_ranks([len(own) * (rank == own_rank()) for rank in range(num_ranks())], own.device)
    rows = torch.zeros(sum(sizes), *own.shape[1:], dtype=own.dtype, device=on_backend(own.device))
    first = sum(sizes[: own_rank()])
    rows[first : first + len(own)] = own
    dist.all_reduce(rows)
    return rows.to(own.device)
