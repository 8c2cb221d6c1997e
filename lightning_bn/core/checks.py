"""Checks of arguments that several verbs and callbacks take."""

from __future__ import annotations

from types import TracebackType
from typing import Any


def check_int(name: str, value: Any, at_least: int) -> None:
    """Raise unless an argument is a whole number and large enough."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number but is {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least} but is {value}.")


def check_bool(name: str, value: Any) -> None:
    """Raise unless an argument is True or False: Python takes ``"no"`` as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False but is {value!r}.")


class NoStopIteration:
    """Turns a StopIteration, which would silently end the loop around it, into a RuntimeError naming ``what``."""

    # contextlib.contextmanager would re-raise the StopIteration instead of the error
    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, StopIteration):
            raise RuntimeError(f"{self._what} raised StopIteration.") from error
