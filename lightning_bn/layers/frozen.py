"""FrozenBN: the layer normalizes with its stored statistics, whatever mode it is in (paper, Sec. 4.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behavior import Behavior, has_behavior


class Frozen(Behavior):
    """Stored statistics in training, too: the layer runs its own forward in eval mode.

    Written without a context manager, so that torch.compile traces through it.
    """

    kind = "frozen"
    name = "frozen"

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Normalize ``input`` with the stored statistics."""
        asked = layer.training
        layer.training = False
        try:
            return forward(input)
        finally:
            layer.training = asked

    def normalization_batch(self, samples: float) -> float:
        """None: the layer normalizes with the population."""
        return torch.nan


def is_frozen(layer: nn.Module) -> bool:
    """Whether statistics are frozen: by us, or by `BaseFinetuning`, which sets ``track_running_stats=False``."""
    return has_behavior(layer, "frozen") or (
        getattr(layer, "running_mean", None) is not None and not layer.track_running_stats
    )
