"""What becomes of a fit when one of its passes fails: the error comes out, or is warned of and counted."""

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
"""What a failed pass does to a fit that would have gone on without it."""


def check_on_error(on_error: Any) -> None:
    """Raise for what is none of `OnError`.

    Raises:
        ValueError: Naming it.
    """
    if on_error not in ("warn", "raise"):
        raise ValueError(f"on_error must be 'warn' or 'raise' but is {on_error!r}.")


def located(error: Exception, where: str) -> Exception:
    """The error with ``where`` in front of its message, itself if that can be.

    An error that makes its message in a way of its own (`KeyError`, `OSError`) gets a `RuntimeError` around it, and so
    does `StopIteration`, which would end Lightning's epoch without a word.
    """
    if str(error).startswith(where):  # the same object, raised once more
        return error
    plain = type(error).__str__ is Exception.__str__ and len(error.args) <= 1
    if plain and not isinstance(error, StopIteration) and all(isinstance(a, str) for a in error.args):
        error.args = (f"{where}: {error}" if error.args else f"{where}.",)
        return error
    around = RuntimeError(f"{where}: {type(error).__name__}: {error}")
    around.__cause__ = error
    return around


@dataclass
class Failures:
    """The failed passes of one fit.

    Once a pass has succeeded, or where the fit would have run until now without one, a failed pass leaves the
    statistics as they were and is warned of, once for each cause. Out of memory, Ctrl-C and exits come out always.

    Attributes:
        owner: The callback whose passes they are, for messages.
        key: What the number of failed passes is logged as.
        instead: What happens to the statistics where a pass fails, for messages.
        on_error: Whether to warn, or to raise.
        succeeded: Whether a pass has succeeded; True from the start if the first may fail, too.
        count: Failed passes so far.
    """

    owner: str
    key: str
    instead: str
    on_error: OnError
    succeeded: bool = False
    count: int = 0
    _said: set[str] = field(default_factory=set)

    def attempt(self, trainer: Trainer, run: Callable[[], T | None]) -> T | None:
        """What ``run`` returns; None if it fails and that is not to be raised, or if it found nothing to do."""
        try:
            found = run()
        except Exception as error:
            if isinstance(error, OUT_OF_MEMORY) and not isinstance(error, NotEnoughMemoryError):
                raise
            if self.on_error == "raise" or not self.succeeded:
                raise located(error, self.owner)  # noqa: B904 - it is the error, or has it for a cause
            self.count += 1
            self._warn(error)
            log_row(trainer, {self.key: float(self.count)})
            return None
        self.succeeded = self.succeeded or found is not None
        return found

    def state_dict(self) -> dict[str, Any]:
        """Whether a pass has succeeded, and how many failed."""
        return {"succeeded": self.succeeded, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.succeeded, self.count = state["succeeded"], state["count"]

    def _warn(self, error: Exception) -> None:
        cause = re.sub(r"\d+", "#", f"{type(error).__name__}: {error}")  # the same of another batch is no other cause
        if cause in self._said or (isinstance(error, AnotherRankFailedError) and get_rank() != 0):
            return
        self._said.add(cause)
        # by the rank whose error it is, which need not be the first
        warnings.warn(
            f"{self.owner}: a pass failed, so {self.instead}, and training goes on (on_error='raise' ends it "
            f"instead). The cause: {type(error).__name__}: {error}",
            stacklevel=2,
        )
