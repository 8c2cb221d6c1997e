"""Behavior of FrozenBN: a layer uses its stored statistics in any mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behavior import Behavior, has_behavior


class Frozen(Behavior):
    """Runs the layer's own forward in eval mode."""

    kind = "frozen"
    name = "frozen"

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        mode = layer.training  # no context manager, because torch.compile traces through this
        layer.training = False
        try:
            return forward(input)
        finally:
            layer.training = mode

    def normalization_batch(self, samples: float) -> float:
        return torch.nan  # the layer uses the population statistics


def is_frozen(layer: nn.Module) -> bool:
    """Return True if `freeze_bn`, or `BaseFinetuning`, which switches tracking off, has frozen the statistics."""
    return has_behavior(layer, "frozen") or (
        getattr(layer, "running_mean", None) is not None and not layer.track_running_stats
    )
