"""Comparison of a custom layer's measured batch with the recovered one.

torch's own classes update running statistics by a known rule. A subclass may use another one, such as biased variances.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.ranks import get_world_size
from lightning_bn.layers.behavior import has_behavior, own_class
from lightning_bn.layers.override import OF_TORCH
from lightning_bn.tracking.drift import is_dead
from lightning_bn.tracking.layer_calls import Call
from lightning_bn.tracking.recovery import recovery_error

UNMEASURABLE = "cannot be measured: no batch_norm call on its channels"
CUSTOM_UPDATE = "updates its running statistics differently from torch"

_MAX_MEAN_DIFFERENCE, _MAX_VAR_DIFFERENCE = 1e-3, 1e-4
"""Allowed differences between recovered and measured batch, in sigma and log ratio, in addition to rounding."""


def custom_layers(layers: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Select layers of other classes than torch's own whose whole batch this rank sees."""
    return {
        name: layer
        for name, layer in layers.items()
        if own_class(layer) not in OF_TORCH and not has_behavior(layer, "domain") and not is_spread(layer)
    }


def is_spread(layer: _BatchNorm) -> bool:
    """Return whether a layer normalizes over several ranks, so that one rank cannot measure its batch."""
    return (isinstance(layer, SyncBatchNorm) or has_behavior(layer, "sync")) and get_world_size() > 1


def differs_from_torch(
    calls: list[Call], tracked: Tensor, running: Tensor, batch: Tensor, called: Tensor, eps: float
) -> Tensor:
    """Return whether a layer's recovered batch differs from its measured calls, averaged as torch's EMA would.

    ``tracked`` and ``running`` are the layer's counter and statistics before the calls. ``called``, ``(C,)``, marks
    channels whose statistics moved. The result is a tensor ``()``; reading it waits for the device.
    """
    expected, decay = running, torch.ones((), dtype=running.dtype, device=running.device)
    for number, (moments, momentum) in enumerate(calls, 1):
        share = 1 / (tracked + number).to(decay) if momentum is None else torch.full_like(decay, momentum)
        statistics = torch.stack([moments.mean, moments.m2 / (moments.count - 1)]).to(running)
        expected, decay = expected.lerp(statistics, share), decay * (1 - share)
    mean, var = (expected - decay * running) / (1 - decay)
    mean_difference = (batch[0] - mean).abs() / var.sqrt() - 2 * recovery_error(running[0], var, decay)
    var_difference = (batch[1] / var).log().abs() - 2**-20 * running[1] / (var * (1 - decay))
    differs = mean_difference.nan_to_num(torch.inf) > _MAX_MEAN_DIFFERENCE
    differs |= var_difference.nan_to_num(torch.inf) > _MAX_VAR_DIFFERENCE
    comparable = mean.isfinite() & var.isfinite() & running.isfinite().all(0) & ~is_dead(var, eps)
    any_differs: Tensor = (differs & comparable & called).any()
    return any_differs
