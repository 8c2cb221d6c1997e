"""A ``torch.compiler.disable`` that does not import ``torch._dynamo`` (6 seconds) before it is needed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def disable_compile(function: F) -> F:
    """Make torch.compile break the graph at a function, and run it and all that it calls eagerly."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # nothing was compiled
            return function(*args, **kwargs)
        if not disabled:
            disable: Any = torch.compiler.disable  # has no types
            disabled.append(disable(function))
        return disabled[0](*args, **kwargs)

    wrapper._torchdynamo_disable = True  # type: ignore[attr-defined]  # read by Dynamo before it traces a call
    return wrapper  # type: ignore[return-value]
