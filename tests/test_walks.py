"""How far a reader walks from a call to its arithmetic: frames and functions of the package."""

from __future__ import annotations

import torch
from torch import nn

from lightning_bn import ghost_bn
from tests.walks import walk


def test_ghost_bn_calls_the_kernel_in_four_frames() -> None:
    layer, x = nn.BatchNorm1d(8), torch.randn(64, 8)
    with ghost_bn(layer, size=16):
        walked = walk(lambda: layer(x))
    assert len(walked.stack) <= 4 and len(walked.functions) <= 11, walked.stack
