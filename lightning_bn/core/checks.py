"""Checks of arguments that several verbs and callbacks take."""

from __future__ import annotations

from types import TracebackType
from typing import Any


def check_int(name: str, value: Any, at_least: int) -> None:
    """Refuse an argument that is not a whole number of at least so much.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number but is {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least} but is {value}.")


def check_bool(name: str, value: Any) -> None:
    """Refuse an argument that is neither True nor False: of ``"no"``, Python would make a yes.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False but is {value!r}.")


class NoStopIteration:
    """Turns a StopIteration from within into a RuntimeError: it would end the loop around it, without a message.

    Args:
        what: What runs in it, for the message.

    Raises:
        RuntimeError: Naming ``what``.
    """

    # A class, because contextlib.contextmanager re-raises the StopIteration instead of an error that it caused.

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, StopIteration):
            raise RuntimeError(f"{self._what} raised StopIteration.") from error
