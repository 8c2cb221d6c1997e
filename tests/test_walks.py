"""Short walks: few frames, functions and files between a call and its arithmetic."""

from __future__ import annotations

import torch
from torch import nn

from lightning_bn import ghost_bn, precise_bn
from tests.walks import walk


def test_precise_bn_reaches_the_kernel_in_five_frames_and_forty_functions() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    batches = [torch.randn(64, 4) for _ in range(4)]
    precise_bn(model, batches)  # imports what is imported once
    found = walk(lambda: precise_bn(model, batches))
    assert len(found.stack) <= 5, found.stack
    assert len(found.functions) <= 40, sorted(code.co_qualname for code in found.functions)


def test_ghost_bn_calls_the_kernel_in_four_frames() -> None:
    layer, x = nn.BatchNorm1d(8), torch.randn(64, 8)
    with ghost_bn(layer, size=16):
        walked = walk(lambda: layer(x))
    assert len(walked.stack) <= 4 and len(walked.functions) <= 11, walked.stack
