"""The batches that a pass shows, each with its number, for messages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.ranks import OUT_OF_MEMORY
from lightning_bn.lockstep.scheduler import LockstepError
from lightning_bn.trainer.failures import located
from lightning_bn.trainer.forward import Forward


class Numbered(NamedTuple):
    """A batch of a pass, its number, and how many samples it holds."""

    number: int
    batch: Any
    samples: int


class Shown:
    """Iterates over batches, and runs the model on them; an error says of which batch it is.

    Args:
        batches: This rank's.
        batch_size_fn: Samples in a batch.
        run: Runs the model on a batch, which comes with its number.
        forward: How it does that, for messages.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        batch_size_fn: BatchSizeFn,
        run: Callable[[tuple[int, Any]], None],
        forward: Forward,
    ) -> None:
        self._batches, self._count, self._run = batches, batch_size_fn, run
        self._how = forward if isinstance(forward, str) else "the forward function"

    def __iter__(self) -> Iterator[Numbered]:
        for number in itertools.count():
            try:
                batch = next(self._batches)
                samples = self._count(batch)
            except StopIteration:
                return
            except OUT_OF_MEMORY:
                raise
            except Exception as error:
                raise located(error, f"batch {number} of the pass could not be read")  # noqa: B904 - it is its cause
            yield Numbered(number, batch, samples)

    def run(self, shown: Numbered) -> None:
        """Run the model on one of them."""
        try:
            self._run((shown.number, shown.batch))
        except (LockstepError, *OUT_OF_MEMORY):  # which say themselves what they are about
            raise
        except Exception as error:
            raise located(error, f"batch {shown.number} of the pass failed in {self._how}")  # noqa: B904
