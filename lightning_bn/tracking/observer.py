"""The distance of training batches from the EMA that evaluation will use.

Batch statistics are recovered from running statistics (`recovery`), or measured where that is inaccurate.
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
from lightning_bn.tracking.drift import Drift, Observation, is_dead, split
from lightning_bn.tracking.history import Traces
from lightning_bn.tracking.layer_calls import Call, ema_statistics
from lightning_bn.tracking.recovery import MAX_ERROR, UNMEASURABLE, Snapshot, StepRecorder, is_spread, not_recoverable

_MAX_PENDING = 16  # steps whose arithmetic is done at once; bounds memory
_NOT_MEASURED = "not measured: synchronized over ranks, and its batches cannot be recovered"


class Observer:
    """Compares the batch statistics of layers with their EMA, over a window of batches.

    ``channels`` are the indices of traced channels in the vector of all layers' channels.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], channels: Sequence[int] = ()) -> None:
        self._recorder = StepRecorder(layers)
        self._sizes, self._eps = self._recorder.sizes, self._recorder.eps
        self._channels = torch.tensor(list(channels), dtype=torch.int64, device=self._eps.device)
        self._reasons: dict[str, str] = {}  # layer name -> why its current batch is not recovered
        self.traces = Traces()
        self._empty_window()

    def _empty_window(self) -> None:
        total, zeros = len(self._eps), self._eps.new_zeros
        self.batches, self._check = 0, True
        # step, and what was measured: layer index -> mean and variance, None if it was not called
        self._pending: list[tuple[int, Snapshot, dict[int, Tensor | None]]] = []
        self._window = Moments(zeros(total), zeros(2, total), zeros(2, total))
        self._dead, self._nonfinite = zeros(total).bool(), zeros(total).bool()
        self._direct: dict[str, str] = {}
        self._inaccurate: set[str] | None = None

    def before_batch(self) -> None:
        """Begin a batch, in the modes in which the model will run."""
        layers = self._recorder.layers
        if self._inaccurate is None:  # waits for the device, once a window
            worst = [float(part.amax()) for part in self._recorder.recovery_errors().cpu().split(self._sizes)]
            self._inaccurate = {n for n, error in zip(layers, worst, strict=True) if MAX_ERROR < error < torch.inf}
        reasons = {name: self._not_recovered(name, layer) for name, layer in layers.items()}
        self._reasons = {name: reason for name, reason in reasons.items() if reason}
        measured = [name for name, reason in self._reasons.items() if reason not in (_NOT_MEASURED, UNMEASURABLE)]
        self._recorder.before_batch(check=self._check, measured=measured)

    def _not_recovered(self, name: str, layer: _BatchNorm) -> str:
        untrusted = self._recorder.untrusted.get(name, "")
        if untrusted == UNMEASURABLE:
            return untrusted
        inaccurate = "mean of many sigma" if name in (self._inaccurate or ()) else ""
        reason = not_recoverable(layer) or inaccurate or untrusted
        return _NOT_MEASURED if reason and is_spread(layer) else reason

    def after_batch(self, step: int = 0) -> bool:
        """End a batch and return whether it was observed; skip the call for a batch that failed."""
        recorder, snapshot = self._recorder, self._recorder.after_batch()
        if snapshot is None:
            return False
        for name, reason in recorder.untrusted.items():
            if name in recorder.compared or reason == UNMEASURABLE:
                self._reasons[name] = reason
        self._direct |= self._reasons
        layers = enumerate(recorder.layers.items())
        measured = {i: _average(recorder.calls.inputs(layer)) for i, (name, layer) in layers if name in self._reasons}
        self._pending.append((step, snapshot, measured))
        self.batches, self._check = self.batches + 1, False
        if len(self._pending) == _MAX_PENDING:
            self._add_pending()
        return True

    def _add_pending(self) -> None:
        if not self._pending:
            return
        ema, after, batch, _, called = self._recorder.recover([snapshot for _, snapshot, _ in self._pending])
        for row, (_, _, measured) in enumerate(self._pending):
            for layer, statistics in measured.items():
                channels = slice(self._recorder.starts[layer], self._recorder.starts[layer + 1])
                called[row, channels] = statistics is not None
                if statistics is not None:
                    batch[row, :, channels] = statistics
        finite = (batch.isfinite() & ema.isfinite()).all(1)
        dead = is_dead(batch[:, 1], self._eps)
        compared = called & finite & ~dead & ~is_dead(ema[:, 1], self._eps)
        offsets = torch.stack([mean_offsets(batch[:, 0], ema[:, 0], ema[:, 1]), var_offsets(batch[:, 1], ema[:, 1])], 1)
        for offset, counts in zip(torch.where(compared[:, None], offsets, 0.0), compared.to(offsets), strict=True):
            self._window += Moments(counts, offset, torch.zeros_like(offset))
        for row, known in zip(dead, called & finite, strict=True):
            self._dead = torch.where(known, row, self._dead)
        self._nonfinite |= (called & ~finite | ~after.isfinite().all(1)).any(0)
        points = torch.stack([ema[:, 0], batch[:, 0]], 1)[..., self._channels]
        for (step, _, _), point in zip(self._pending, points, strict=True):
            self.traces.add(step, point)
        self._pending = []

    def abandon(self) -> None:
        self._recorder.abandon()

    def take(self) -> Observation:
        """Return the window's result, and start a new window."""
        self._add_pending()
        drift = split(Moments(*(v.cpu() for v in vars(self._window).values())), self._sizes)
        means, variances = (Drift(*(part[row] for part in drift)) for row in (0, 1))
        channels = [where.cpu().double().split(self._sizes) for where in (self._dead, self._nonfinite)]
        dead, nonfinite = (torch.stack([part.mean() for part in of_layers]) for of_layers in channels)
        observation = Observation(means, variances, dead, nonfinite, torch.tensor(self._sizes), self._direct)
        self._empty_window()
        return observation

    def state_dict(self) -> dict[str, Any]:
        self._add_pending()
        return {
            "batches": self.batches,
            "window": [v.clone() for v in vars(self._window).values()],
            "dead": self._dead.clone(),
            "nonfinite": self._nonfinite.clone(),
            "direct": dict(self._direct),
            "inaccurate": None if self._inaccurate is None else sorted(self._inaccurate),
            "untrusted": dict(self._recorder.untrusted),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches, self._pending = state["batches"], []
        self._window = Moments(*(v.to(self._eps) for v in state["window"]))
        self._dead, self._nonfinite = (state[key].to(self._eps.device) for key in ("dead", "nonfinite"))
        self._direct = dict(state["direct"])
        self._inaccurate = None if state["inaccurate"] is None else set(state["inaccurate"])
        self._recorder.untrusted = dict(state["untrusted"])


def _average(calls: Sequence[Call]) -> Tensor | None:
    return ema_statistics(functools.reduce(operator.add, (call.moments for call in calls))) if calls else None
