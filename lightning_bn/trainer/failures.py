"""Failing passes of a fit: their errors are raised, or turned into warnings and counted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from lightning.pytorch import Trainer

from lightning_bn.core.ranks import OUT_OF_MEMORY, AnotherRankFailedError, get_rank
from lightning_bn.lockstep.pooled import NotEnoughMemoryError
from lightning_bn.trainer.logging import log_row

T = TypeVar("T")
OnError: TypeAlias = Literal["warn", "raise"]
"""A failed pass warns, and the fit goes on, or it raises."""


def check_on_error(on_error: Any) -> None:
    """Raise ValueError for a value that is not in `OnError`."""
    if on_error not in ("warn", "raise"):
        raise ValueError(f"on_error must be 'warn' or 'raise' but is {on_error!r}.")


def located(error: Exception, where: str) -> Exception:
    """Prefix an error's message with ``where``, and return the error, or a `RuntimeError` caused by it.

    The latter wraps errors whose message cannot change, and `StopIteration`, which would end Lightning's epoch.
    """
    if str(error).startswith(where):  # raised again
        return error
    plain = type(error).__str__ is Exception.__str__ and len(error.args) <= 1  # KeyError, OSError are not
    if plain and not isinstance(error, StopIteration) and all(isinstance(a, str) for a in error.args):
        error.args = (f"{where}: {error}" if error.args else f"{where}.",)
        return error
    wrapper = RuntimeError(f"{where}: {type(error).__name__}: {error}")
    wrapper.__cause__ = error
    return wrapper


@dataclass
class Failures:
    """Counts the failed passes of one fit.

    Once a pass has succeeded, a failed one warns, once for each cause. Out of memory, Ctrl-C and exits are always
    raised.
    """

    owner: str  # class name of the callback
    key: str  # metric key of the number of failed passes
    consequence: str  # what happens to the statistics after a failure, for the warning
    on_error: OnError
    succeeded: bool = False  # a pass has succeeded; True from the start if the first one may fail, too
    count: int = 0
    _warned: set[str] = field(default_factory=set)

    def attempt(self, trainer: Trainer, run: Callable[[], T | None]) -> T | None:
        """Return the result of ``run``; None after a failure that warns."""
        try:
            result = run()
        except Exception as error:
            if isinstance(error, OUT_OF_MEMORY) and not isinstance(error, NotEnoughMemoryError):
                raise
            if self.on_error == "raise" or not self.succeeded:
                raise located(error, self.owner)  # noqa: B904 - it is the error, or has it for a cause
            self.count += 1
            self._warn(error)
            log_row(trainer, {self.key: float(self.count)})
            return None
        self.succeeded = self.succeeded or result is not None
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"succeeded": self.succeeded, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.succeeded, self.count = state["succeeded"], state["count"]

    def _warn(self, error: Exception) -> None:
        cause = re.sub(r"\d+", "#", f"{type(error).__name__}: {error}")  # the number of the batch makes no difference
        if cause in self._warned or (isinstance(error, AnotherRankFailedError) and get_rank() != 0):
            return
        self._warned.add(cause)
        # not rank_zero_warn: another rank may have the error
        warnings.warn(
            f"{self.owner}: a pass failed, so {self.consequence}, and training goes on (on_error='raise' ends it "
            f"instead). The cause: {type(error).__name__}: {error}",
            stacklevel=2,
        )
