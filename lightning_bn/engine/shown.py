"""The batches that a pass shows, each with its number, for messages; what fails on one rank fails on all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from lightning_bn.distributed.moments import num_ranks, sum_over_ranks
from lightning_bn.engine.failures import OUT_OF_MEMORY, AnotherRankFailedError, located
from lightning_bn.engine.forward import Forward
from lightning_bn.functional.lockstep import LockstepError
from lightning_bn.functional.samples import Count


class Numbered(NamedTuple):
    """A batch of a pass, its number, and how many samples it holds."""

    number: int
    batch: Any
    samples: int


class Shown:
    """Iterates over batches, and runs the model on them; an error says of which batch it is.

    Where several ranks take part, one whose loader fails has no more batches, so that it keeps the others company to
    the end, as one does that has fewer; only then it raises.

    Args:
        batches: This rank's.
        count: Samples in a batch.
        run: Runs the model on a batch, which comes with its number.
        forward: How it does that, for messages.
    """

    def __init__(
        self, batches: Iterator[Any], count: Count, run: Callable[[tuple[int, Any]], None], forward: Forward
    ) -> None:
        self._batches, self._count, self._run = batches, count, run
        self._how = forward if isinstance(forward, str) else "the forward function"
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Numbered]:
        for number in itertools.count():
            try:
                batch = next(self._batches)
                samples = self._count(batch)
            except (StopIteration, *OUT_OF_MEMORY) as error:
                if isinstance(error, StopIteration):
                    return
                raise
            except Exception as error:
                self._error = located(error, f"batch {number} of the pass could not be read")
                if num_ranks() > 1:
                    return
                raise self._error  # noqa: B904 - it is the error, or has it for a cause
            yield Numbered(number, batch, samples)

    def run(self, shown: Numbered) -> None:
        """Run the model on one of them."""
        try:
            self._run((shown.number, shown.batch))
        except (LockstepError, *OUT_OF_MEMORY):  # which say themselves what they are about
            raise
        except Exception as error:
            raise located(error, f"batch {shown.number} of the pass failed in {self._how}")  # noqa: B904

    @contextmanager
    def on_all_ranks(self, device: torch.device) -> Iterator[None]:
        """All ranks come through, or none: measuring sees to that for the rest."""
        try:
            yield
        except Exception:
            if self._error is None:
                raise
            raise self._error  # noqa: B904 - what came of it is no news
        failed, *_ = sum_over_ranks([self._error is not None], device)
        if failed:
            raise self._error or AnotherRankFailedError()
