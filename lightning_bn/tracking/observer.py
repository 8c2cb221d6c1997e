"""Observing training: what batches the layers see, held against the EMA that evaluation will use.

What an observed batch had is recovered from running statistics (see `functional.recover`): a few vector operations for
all layers together, and memory for a few numbers a channel. Layers for which that is not accurate, that store nothing
in training (frozen ones), or that move their statistics otherwise than torch (`functional.trusted`) are measured
directly.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.gaps import mean_offsets, var_offsets
from lightning_bn.core.moments import Moments
from lightning_bn.layers.behavior import Handle
from lightning_bn.tracking.drift import Drift, Observation, is_dead, share_of_layers, split
from lightning_bn.tracking.observed import Observed
from lightning_bn.tracking.recovery import MAX_ERROR
from lightning_bn.tracking.running_stats import Recovery, not_recoverable
from lightning_bn.tracking.trusted import UNSEEN, is_spread, not_trusted, to_be_checked


class Observer:
    """Watches the statistics of layers over batches.

    Args:
        layers: Qualified name -> layer; each stores running statistics.
        channels: Places, in the vector of all layers' channels, of channels to trace one by one.

    Attributes:
        batches: Batches in the window so far.
        traced: Of the traced channels in the last observed batch, the EMA's mean before it and its own, ``(2, k)``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> bn = nn.BatchNorm1d(1)
        >>> observer = Observer({"bn": bn})
        >>> for shift in (0.5, 0.5):
        ...     observer.before_batch()
        ...     _ = bn(torch.tensor([[-1.0], [1.0]]) + shift)
        ...     _ = observer.after_batch()
        >>> observer.take().means.lag  # 0.5 sigma at first, then a tenth less
        tensor([0.4645], dtype=torch.float64)
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], channels: Sequence[int] = ()) -> None:
        self._recovery = Recovery(layers)
        self._layers, self._sizes, self._eps = self._recovery.layers, self._recovery.sizes, self._recovery.eps
        self._channels = torch.tensor(list(channels), dtype=torch.int64, device=self._eps.device)
        self._observed = Observed(layers)
        self._begun: tuple[Handle, dict[str, str], set[str]] | None = None
        self._inaccurate: set[str] = set()
        self._not_trusted: dict[str, str] = {}
        self._closely = True
        self.traced = self._eps.new_empty(2, len(channels))
        self._empty_window()

    def _empty_window(self) -> None:
        total = sum(self._sizes)
        zeros = self._eps.new_zeros
        self.batches = 0
        self._window = Moments(zeros(total), zeros(2, total), zeros(2, total))
        self._dead, self._nonfinite = zeros(total).bool(), zeros(total).bool()
        self._direct: dict[str, str] = {}

    def before_batch(self) -> None:
        """Call right before a batch reaches the model, in the modes in which it will."""
        self.abandon()
        if self.batches == 0:
            self._judge_accuracy()
            self._closely = True
        reasons = {name: reason for name, layer in self._layers.items() if (reason := self._not_recovered(name, layer))}
        checked = set(to_be_checked(self._layers)) - set(reasons) if self._closely else set()
        measured = {name for name, reason in reasons.items() if reason not in (_NOT_AT_ALL, UNSEEN)}
        self._observed.begin()
        handle = Handle([self._layers[name] for name in measured | checked], self._observed)
        self._begun = handle, reasons, checked
        self._recovery.before_batch(self._closely)

    def after_batch(self) -> bool:
        """Call right after it, or never: a batch that failed leaves no trace. Whether one was observed."""
        around = self._recovery.after_batch()
        if around is None or self._begun is None:
            return False
        _, reasons, checked = self._begun
        self.abandon()
        self._closely = False
        if checked:
            self._not_trusted |= not_trusted(self._recovery, around, checked, self._observed)
        unseen = {name: UNSEEN for name in reasons if self._layers[name] in self._observed.unseen}
        self._not_trusted |= unseen
        reasons |= {name: why for name, why in self._not_trusted.items() if name in checked or name in unseen}
        self._direct.update(reasons)
        before, after, batch, _, called = (found[0] for found in self._recovery.recover([around]))
        parts = zip(self._layers.items(), batch.split(self._sizes, 1), called.split(self._sizes), strict=True)
        for (name, layer), statistics, was_called in parts if reasons else ():
            if name in reasons:
                calls = [] if layer in self._observed.unseen else self._observed.seen.get(layer, [])
                was_called.fill_(bool(calls))
                if calls:
                    seen = functools.reduce(operator.add, (call.moments for call in calls))
                    statistics.copy_(torch.stack([seen.mean, seen.m2 / (seen.count - 1)]))
        self._add(before, batch, called)
        self._nonfinite |= ~after.isfinite().all(0)
        self.traced = torch.stack([before[0], batch[0]])[:, self._channels]
        return True

    def _add(self, ema: Tensor, batch: Tensor, called: Tensor) -> None:
        finite = (batch.isfinite() & ema.isfinite()).all(0)
        dead = is_dead(batch[1], self._eps)
        compared = called & finite & ~dead & ~is_dead(ema[1], self._eps)
        offsets = torch.stack([mean_offsets(batch[0], ema[0], ema[1]), var_offsets(batch[1], ema[1])])
        offsets = torch.where(compared, offsets, 0.0)
        self._window += Moments(compared.to(offsets.dtype), offsets, torch.zeros_like(offsets))
        self._dead = torch.where(called & finite, dead, self._dead)
        self._nonfinite |= called & ~finite
        self.batches += 1

    def abandon(self) -> None:
        """Take back from the layers what an observed batch was given, whether or not it came to its end."""
        if self._begun is not None:
            self._begun[0].undo()
        self._begun = None
        self._recovery.abandon()

    def take(self) -> Observation:
        """What the window says; and start a new one."""
        window = Moments(*(v.cpu() for v in (self._window.count, self._window.mean, self._window.m2)))
        drift = split(window, self._sizes)
        means, variances = (Drift(*(part[row] for part in drift)) for row in (0, 1))
        dead, nonfinite = (share_of_layers(where.cpu(), self._sizes) for where in (self._dead, self._nonfinite))
        observation = Observation(means, variances, dead, nonfinite, torch.tensor(self._sizes), self._direct)
        self._empty_window()
        return observation

    def state_dict(self) -> dict[str, Any]:
        """The window so far, in plain types and tensors."""
        return {
            "batches": self.batches,
            "window": [v.clone() for v in (self._window.count, self._window.mean, self._window.m2)],
            "dead": self._dead.clone(),
            "nonfinite": self._nonfinite.clone(),
            "direct": dict(self._direct),
            "inaccurate": sorted(self._inaccurate),
            "not_trusted": dict(self._not_trusted),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a window."""
        self.batches = state["batches"]
        self._window = Moments(*(v.to(self._eps) for v in state["window"]))
        self._dead, self._nonfinite = (state[key].to(self._eps.device) for key in ("dead", "nonfinite"))
        self._direct, self._inaccurate = dict(state["direct"]), set(state["inaccurate"])
        self._not_trusted = dict(state["not_trusted"])

    def _not_recovered(self, name: str, layer: _BatchNorm) -> str:
        """Why a layer's batch statistics are not recovered; empty if they are."""
        known = self._not_trusted.get(name, "")
        if known == UNSEEN:
            return known
        reason = not_recoverable(layer) or ("mean of many sigma" if name in self._inaccurate else "") or known
        return _NOT_AT_ALL if reason and is_spread(layer) else reason

    def _judge_accuracy(self) -> None:
        """From where the running statistics are now: which layers to measure directly in the window that begins."""
        worst = [float(part.amax()) for part in self._recovery.inaccuracy().cpu().split(self._sizes)]
        self._inaccurate = {n for n, e in zip(self._layers, worst, strict=True) if MAX_ERROR < e < torch.inf}


_NOT_AT_ALL = "not measured: a layer synced over ranks whose statistics cannot be recovered"
