"""Domains of batches that are run outside of Lightning's loops, whose hooks would say which ones they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import Trainer


@contextmanager
def domains_of(trainer: Trainer, batch: Any, dataloader_idx: int = 0) -> Iterator[None]:
    """Have every callback whose layers keep domains apart say which one a batch is from."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "showing_batch"):
                stack.enter_context(callback.showing_batch(batch, dataloader_idx))
        yield
