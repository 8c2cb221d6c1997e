"""Errors over ranks: what one rank meets, all know of, so that none is left alone in a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_bn.distributed.moments import sum_over_ranks

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
