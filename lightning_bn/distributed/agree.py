"""Errors over ranks: what one rank meets, all know of, so that none is left alone in a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_bn.distributed.moments import sum_over_ranks

NOT_OURS = (MemoryError, torch.OutOfMemoryError)
"""Errors that are nobody's to swallow, beside those that are no `Exception`."""


@contextmanager
def agreed(device: torch.device) -> Iterator[None]:
    """Raise on every rank if one has met an error in here: its own on that rank, word of it on the others.

    There must be no collective in here that a rank with an error would not enter.

    Args:
        device: Of the model.

    Raises:
        RuntimeError: If only others have met one.
    """
    error: Exception | None = None
    try:
        yield
    except NOT_OURS:
        raise
    except Exception as caught:
        error = caught
    failed, *_ = sum_over_ranks([error is not None], device)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("another rank met an error, which it names")
