"""How far a reader walks: the package's frames, functions and files that a call runs through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import lightning_bn

_ROOT = str(Path(str(lightning_bn.__file__)).parent)


@dataclass
class Walk:
    """What ran of the package: the deepest stack of its frames, outermost first, and all functions."""

    stack: list[str] = field(default_factory=list)
    functions: set[CodeType] = field(default_factory=set)

    @property
    def files(self) -> set[str]:
        return {code.co_filename for code in self.functions}


def walk(call: Callable[[], Any]) -> Walk:
    """Run ``call`` and trace the package's functions. Comprehensions and lambdas count as part of their function."""
    found = Walk()

    def name(code: CodeType) -> str:
        return f"{Path(code.co_filename).relative_to(_ROOT)}:{code.co_qualname}"

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(_ROOT) or code.co_name.startswith("<"):
            return
        found.functions.add(code)
        stack, at = [], frame
        while at is not None:
            if at.f_code.co_filename.startswith(_ROOT) and not at.f_code.co_name.startswith("<"):
                stack.append(at.f_code)
            at = at.f_back  # type: ignore[assignment]
        if len(stack) > len(found.stack):
            found.stack = [name(c) for c in reversed(stack)]

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found
