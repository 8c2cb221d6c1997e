"""A pass needs the memory of a bare train-mode forward under no_grad, and O(channels): measured in fresh processes."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from torch import nn

from lightning_bn import precise_bn
from tests.ranks import run_on_ranks

pytestmark = [
    pytest.mark.ddp,  # for the processes
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks glibc"),
]

ACTIVATION = 50
"""MiB of each activation."""

_M_MMAP_THRESHOLD = -3
"""From this size on glibc gives a tensor pages of its own and takes them back; by itself it keeps up to 64 MiB."""

LAYOUTS = {
    "NCHW": {},
    "channels_last": {"memory_format": torch.channels_last},
    "bf16 NCHW": {"dtype": torch.bfloat16},
    "bf16 channels_last": {"dtype": torch.bfloat16, "memory_format": torch.channels_last},
}


def peak(how: str, layout: str, mean: float) -> float:
    """MiB by which this fresh process grew at most while a network ran over a batch."""
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.BatchNorm2d(32))
    nn.init.constant_(model[0].bias, mean)
    model = model.to(**LAYOUTS[layout]).train()
    large, small = (
        torch.randn(n, 3, 160, 160).to(**LAYOUTS[layout]) for n in (64 // model[0].weight.element_size(), 1)
    )

    def forward(x: torch.Tensor) -> None:
        if how == "precise_bn":
            precise_bn(model, [x])
        else:
            with torch.no_grad():
                model(x)

    forward(small)  # loads what is loaded once
    before = _status("VmRSS")
    forward(large)
    return _status("VmHWM") - before


def _status(key: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_memory_is_that_of_a_bare_forward(layout: str, mean: float) -> None:
    (bare,) = run_on_ranks(peak, 1, "bare", layout, mean)
    (measured,) = run_on_ranks(peak, 1, "precise_bn", layout, mean)
    assert bare > 0.9 * ACTIVATION, "the measurement sees activations"
    assert measured < bare + 0.25 * ACTIVATION
