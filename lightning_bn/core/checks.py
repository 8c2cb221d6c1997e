"""Checks of arguments that several verbs and callbacks take."""

from __future__ import annotations

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
