"""Which layers move their running statistics as torch's do, so that their batches can be recovered from these.

torch's own classes do. A layer of any other class is held against its inputs on a batch now and then: a subclass may
write its running statistics itself, in whatever convention, and count as it likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.ranks import get_world_size
from lightning_bn.layers.behavior import has_behavior, own_class
from lightning_bn.layers.override import OF_TORCH
from lightning_bn.tracking.drift import is_dead
from lightning_bn.tracking.observed import Call, Observed
from lightning_bn.tracking.recovery import recovery_error
from lightning_bn.tracking.running_stats import Recovery, RunningStatsBeforeAfter

UNSEEN = "cannot be seen: no batch_norm call of its channels"
"""Of a layer whose inputs cannot be measured either."""

_OTHERWISE = "moves its statistics otherwise than torch"
_MEAN_OFF, _VAR_OFF = 1e-3, 1e-4
"""Sigma, and log ratio, by which a recovered batch may differ from the measured one, besides rounding."""


def to_be_checked(layers: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Those of other classes than torch's own, as far as one rank sees all that they normalize."""
    return {
        name: layer
        for name, layer in layers.items()
        if own_class(layer) not in OF_TORCH and not has_behavior(layer, "domain") and not is_spread(layer)
    }


def is_spread(layer: _BatchNorm) -> bool:
    """Whether a layer's batch is spread over ranks, which do not all measure."""
    return (isinstance(layer, SyncBatchNorm) or has_behavior(layer, "sync")) and get_world_size() > 1


def not_trusted(
    recovery: Recovery, around: RunningStatsBeforeAfter, names: Iterable[str], observed: Observed
) -> dict[str, str]:
    """Layers whose batch, as recovered, is not the one that was observed, and why: one wait for the device."""
    step = recovery.recover([around])
    before, batch, kept, called = step.before[0], step.batch[0], step.kept[0], step.called[0]
    parts = [part.split(recovery.sizes, -1) for part in (before, batch, kept, called, recovery.eps)]
    places = {name: place for place, name in enumerate(recovery.layers)}
    reasons, verdicts = {}, {}
    for name in names:
        layer, place = recovery.layers[name], places[name]
        if layer in observed.unseen:
            reasons[name] = UNSEEN
        elif layer in observed.seen:
            own = [part[place] for part in parts]
            verdicts[name] = _differs(observed.seen[layer], around.tracked[place], *own)
    if verdicts:
        found = torch.stack(list(verdicts.values())).tolist()
        reasons |= {name: _OTHERWISE for name, differs in zip(verdicts, found, strict=True) if differs}
    return reasons


def _differs(
    calls: list[Call], tracked: Tensor, before: Tensor, batch: Tensor, kept: Tensor, called: Tensor, eps: Tensor
) -> Tensor:
    """Whether a recovered batch is not that of some calls, put together as the EMA does it."""
    running, left = before, torch.ones_like(kept)
    for number, (moments, momentum) in enumerate(calls, 1):
        share = momentum if momentum is not None else 1 / (tracked + number).to(kept)
        own = torch.stack([moments.mean, moments.m2 / (moments.count - 1)]).to(before)
        running, left = running.lerp(own, share), left * (1 - share)
    mean, var = (running - left * before) / (1 - left)
    off_mean = (batch[0] - mean).abs() / var.sqrt() - 2 * recovery_error(before[0], var, left)
    off_var = (batch[1] / var).log().abs() - 2**-20 * before[1] / (var * (1 - left))
    off = (off_mean.nan_to_num(torch.inf) > _MEAN_OFF) | (off_var.nan_to_num(torch.inf) > _VAR_OFF)
    told = mean.isfinite() & var.isfinite() & before.isfinite().all(0) & ~is_dead(var, eps)
    differs: Tensor = (off & told & called).any()
    return differs
