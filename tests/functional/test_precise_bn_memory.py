"""A pass needs the memory of a bare train-mode forward under no_grad, and O(channels): measured in another process."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_bn import precise_bn
from tests.memory import growth
from tests.ranks import run_on_ranks

pytestmark = [
    pytest.mark.ddp,  # for the processes
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks glibc"),
]

ACTIVATION = 50
"""MiB of each activation."""

LAYOUTS = {
    "NCHW": {},
    "channels_last": {"memory_format": torch.channels_last},
    "bf16 NCHW": {"dtype": torch.bfloat16},
    "bf16 channels_last": {"dtype": torch.bfloat16, "memory_format": torch.channels_last},
}


def peaks(layout: str, mean: float) -> tuple[float, float]:
    """MiB by which this process grew at most while a network ran over a batch: barely, and in a pass."""
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.BatchNorm2d(32))
    nn.init.constant_(model[0].bias, mean)
    model = model.to(**LAYOUTS[layout]).train()
    large, small = (
        torch.randn(n, 3, 160, 160).to(**LAYOUTS[layout]) for n in (64 // model[0].weight.element_size(), 1)
    )

    def forward(x: torch.Tensor) -> None:
        with torch.no_grad():
            model(x)

    forward(small), precise_bn(model, [small], normalization_batch_size="loader")  # loads what is loaded once
    return growth(lambda: forward(large)), growth(lambda: precise_bn(model, [large], normalization_batch_size="loader"))


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_memory_is_that_of_a_bare_forward(layout: str, mean: float) -> None:
    ((bare, measured),) = run_on_ranks(peaks, 1, layout, mean)
    assert bare > 0.9 * ACTIVATION, "the measurement sees activations"
    assert measured < bare + 0.25 * ACTIVATION
