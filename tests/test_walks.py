"""Short walks: few frames and functions of the package between a call and its arithmetic."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import lightning_bn
from lightning_bn import ghost_bn, precise_bn

_ROOT = str(Path(str(lightning_bn.__file__)).parent)


def walk(call: Callable[[], Any]) -> tuple[list[str], set[str]]:
    """What a call runs of the package: the deepest stack of its frames, outermost first, and all functions.

    Comprehensions and lambdas count as part of their function.
    """
    deepest, functions = list[str](), set[str]()

    def name(code: CodeType) -> str:
        return f"{Path(code.co_filename).relative_to(_ROOT)}:{code.co_qualname}"

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(_ROOT) or code.co_name.startswith("<"):
            return
        functions.add(name(code))
        stack, at = [], frame
        while at is not None:
            if at.f_code.co_filename.startswith(_ROOT) and not at.f_code.co_name.startswith("<"):
                stack.append(at.f_code)
            at = at.f_back  # type: ignore[assignment]
        if len(stack) > len(deepest):
            deepest[:] = [name(c) for c in reversed(stack)]

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return deepest, functions


def test_precise_bn_reaches_the_kernel_in_five_frames_and_forty_functions() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    batches = [torch.randn(64, 4) for _ in range(4)]
    precise_bn(model, batches)  # imports what is imported once
    stack, functions = walk(lambda: precise_bn(model, batches))
    assert len(stack) <= 5 and len(functions) <= 40, (stack, sorted(functions))


def test_ghost_bn_calls_the_kernel_in_four_frames() -> None:
    layer, x = nn.BatchNorm1d(8), torch.randn(64, 8)
    with ghost_bn(layer, size=16):
        stack, functions = walk(lambda: layer(x))
    assert len(stack) <= 4 and len(functions) <= 11, (stack, sorted(functions))
