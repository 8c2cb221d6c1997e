"""Batch statistics of training steps, recovered from the running statistics before and after them, without a hook.

A layer that is called k times moves its running statistics from r0 to ``r1 = decay * r0 + (1 - decay) * batch``, with
``decay = (1 - momentum)^k``. So ``batch = (r1 - decay * r0) / (1 - decay)``.

A layer whose counter rises by 1 was called once if its statistics moved. A behavior records the momenta of all calls of
other layers, and of layers of custom classes. These may move by another rule: `differs_from_torch`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.ranks import get_world_size
from lightning_bn.layers.behavior import Handle, has_behavior, own_class
from lightning_bn.layers.frozen import is_frozen
from lightning_bn.layers.override import OF_TORCH
from lightning_bn.tracking.drift import is_dead
from lightning_bn.tracking.layer_calls import Call, RecordCalls, ema_statistics

MAX_ERROR = 1e-2  # of a recovered mean, in sigma; layers with a larger error are measured directly
UNMEASURABLE = "cannot be measured: no batch_norm call on its channels"
CUSTOM_UPDATE = "updates its running statistics differently from torch"

# allowed differences between recovered and measured batch, in sigma and log ratio, in addition to rounding
_MAX_MEAN_DIFFERENCE, _MAX_VAR_DIFFERENCE = 1e-3, 1e-4
# in place of a number of calls: 1 if num_batches_tracked rose by 1, else unknown; or as much as it rose
_ONE_IF_COUNTED, _AS_COUNTED = -1, -2


class Snapshot(NamedTuple):
    """Holds the running statistics of all layers around a step."""

    before: Tensor  # means, then variances, (2C,), in the layers' own precision
    after: Tensor
    tracked: Tensor  # num_batches_tracked before the step, (L,)
    tracked_after: Tensor
    calls: list[int]  # a number, `_ONE_IF_COUNTED` or `_AS_COUNTED`; 0 if unknown
    momenta: list[float | None]


class RecoveredSteps(NamedTuple):
    """Holds the statistics of ``N`` steps: means and variances, ``(N, 2, C)`` each."""

    before: Tensor
    after: Tensor
    batch: Tensor  # an average, if there were several calls
    decay: Tensor  # weight of before in after, (N, C)
    called: Tensor  # channels whose layer was called and whose batch is known, (N, C)


def ema_decay(momentum: Tensor, calls: Tensor, tracked: Tensor) -> Tensor:
    """Return ``(1 - momentum)^calls``; a momentum of NaN is the average of all batches, ``tracked`` ones before."""
    averaged = tracked.to(momentum) / (tracked + calls).clamp(min=1)
    return averaged.where(momentum.isnan(), (1 - momentum) ** calls)


def solve_batch_stats(before: Tensor, after: Tensor, decay: Tensor) -> Tensor:
    """Return the batch statistics, with unbiased variances, of a move from ``before`` to ``after``."""
    return (after - decay * before) / (1 - decay)


def recovery_error(mean: Tensor, var: Tensor, decay: Tensor) -> Tensor:
    """Return a recovered mean's error by float32 rounding, in sigma: ``2^-23 |mean| / ((1 - decay) sigma)``."""
    return 2**-23 * mean.abs() / ((1 - decay) * var.sqrt())


def differs_from_torch(calls: list[Call], tracked: Tensor, step: RecoveredSteps, eps: float) -> Tensor:
    """Return whether a layer's recovered step differs from its measured calls, averaged as torch's EMA would.

    The result is a tensor ``()``; reading it waits for the device.
    """
    running, batch = step.before[0], step.batch[0]
    expected, decay = running, torch.ones((), dtype=running.dtype, device=running.device)
    for number, call in enumerate(calls, 1):
        share = 1 / (tracked + number).to(decay) if call.momentum is None else torch.full_like(decay, call.momentum)
        expected, decay = expected.lerp(ema_statistics(call.moments).to(running), share), decay * (1 - share)
    mean, var = solve_batch_stats(running, expected, decay)

    mean_difference = (batch[0] - mean).abs() / var.sqrt() - 2 * recovery_error(running[0], var, decay)
    var_difference = (batch[1] / var).log().abs() - 2**-20 * running[1] / (var * (1 - decay))
    differs = mean_difference.nan_to_num(torch.inf) > _MAX_MEAN_DIFFERENCE
    differs |= var_difference.nan_to_num(torch.inf) > _MAX_VAR_DIFFERENCE
    comparable = mean.isfinite() & var.isfinite() & running.isfinite().all(0) & ~is_dead(var, eps)
    return torch.any(differs & comparable & step.called[0])


class StepRecorder:
    """Records steps of layers whose channels are concatenated to one vector.

    ``untrusted`` maps layers whose batches cannot be recovered to the reason. It grows with the steps that compare
    ``compared``, the layers of custom classes, with their measured inputs.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.layers = dict(layers)
        means = [layer.get_buffer("running_mean") for layer in layers.values()]
        device = means[0].device
        self.sizes = [mean.numel() for mean in means]
        self.starts = [0, *accumulate(self.sizes)]
        self.layer_of = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes)).to(device)  # (C,)
        eps = torch.tensor([layer.eps for layer in layers.values()], dtype=torch.float64)
        self.eps = eps.to(device, torch.float32 if device.type == "mps" else torch.float64)[self.layer_of]
        self.untrusted: dict[str, str] = {}
        self.compared: list[str] = []
        self.calls = RecordCalls(layers)
        self._handle = Handle([], self.calls)
        self._recorded = {layer for layer in layers.values() if own_class(layer) not in OF_TORCH}
        self._counted_once: dict[str, _BatchNorm] = {}  # layers that count one call a forward
        self._calls_by_counter: list[int] = []
        self._buffers = [layer._buffers for layer in layers.values()]
        self._none_tracked = torch.zeros((), dtype=torch.int64, device=device)
        self._one_device = all(mean.device == device for mean in means)
        self._before: tuple[Tensor, Tensor, list[float | None]] | None = None

    def before_batch(self, check: bool = True, measured: Collection[str] = ()) -> None:
        """Begin a step, and measure the inputs of the layers named in ``measured``.

        ``check`` records the momenta of all layers and compares layers of custom classes with their inputs. Compiled
        models are compiled once more for the first step with it.
        """
        self.abandon()
        if check or not self._calls_by_counter:
            self._counted_once = {n: layer for n, layer in self.layers.items() if not has_behavior(layer, "domain")}
            self._calls_by_counter = [_ONE_IF_COUNTED if n in self._counted_once else _AS_COUNTED for n in self.layers]
        recorded, self.compared = [], []
        if check or self._recorded:
            recorded = [layer for layer in self._counted_once.values() if check or layer in self._recorded]
        if check:
            known = {*self.untrusted, *measured}
            custom = (n for n, layer in self._counted_once.items() if own_class(layer) not in OF_TORCH)
            self.compared = [name for name in custom if name not in known and not is_spread(self.layers[name])]
        inputs = [self.layers[name] for name in (*self.compared, *measured)]
        self.calls.begin(recorded, inputs)
        self._handle = Handle({*recorded, *inputs}, self.calls)
        self._before = *self._read(), [layer.momentum for layer in self.layers.values()]

    def after_batch(self) -> Snapshot | None:
        """End a step; return None if its beginning was not recorded."""
        if self._before is None:
            return None
        # The `after` of the previous step does not replace this step's `before`: others may have written in between,
        # and neither the batch-norm kernel nor `tensor.data` changes `tensor._version`.
        (before, tracked, momenta), (after, tracked_after) = self._before, self._read()
        self.abandon()
        snapshot = Snapshot(before, after, tracked, tracked_after, *self._called(momenta))
        if self.calls.unmeasurable:
            self.untrusted |= {n: UNMEASURABLE for n, layer in self.layers.items() if layer in self.calls.unmeasurable}
        if self.compared:
            self.untrusted |= dict.fromkeys(self._differing(snapshot), CUSTOM_UPDATE)
        return snapshot

    def abandon(self) -> None:
        self._before = None
        self._handle.undo()

    def recover(self, steps: Sequence[Snapshot], layers: slice = slice(None)) -> RecoveredSteps:
        """Recover the batch statistics of some steps, for the channels of the layers in a slice."""
        first, end, _ = layers.indices(len(self.sizes))
        channels = slice(self.starts[first], self.starts[end])
        layer_of = self.layer_of[channels] - first
        before, after = (
            torch.stack(side).unflatten(1, (2, -1))[..., channels].to(self.eps)
            for side in ([s.before for s in steps], [s.after for s in steps])
        )
        tracked = torch.stack([s.tracked for s in steps])[:, layers]
        counted = torch.stack([s.tracked_after for s in steps])[:, layers] - tracked
        momentum = self._as_tensor([s.momenta[layers] for s in steps])
        calls = torch.tensor([s.calls[layers] for s in steps]).to(self.eps.device, non_blocking=True)
        calls = torch.where(calls >= 0, calls, counted.where((counted == 1) | (calls == _AS_COUNTED), 0))
        decay = ema_decay(momentum, calls, tracked).index_select(1, layer_of)
        # The counter also counts calls at momentum 0, which move nothing.
        moved = (before != after).any(1) | is_dead(after[:, 1], self.eps[channels])
        called = (calls > 0).index_select(1, layer_of) & moved
        return RecoveredSteps(before, after, solve_batch_stats(before, after, decay[:, None]), decay, called)

    def running(self) -> Tensor:
        """Copy the running means and variances, ``(2, C)``."""
        return self._read()[0].view(2, -1).to(self.eps)

    def recovery_errors(self) -> Tensor:
        """Return the error of a mean recovered now, in sigma, ``(C,)``; 0 for dead channels."""
        running, tracked = self._read()
        mean, var = running.view(2, -1).to(self.eps)
        momentum = self._as_tensor([[layer.momentum for layer in self.layers.values()]])[0]
        decay = ema_decay(momentum, torch.ones_like(tracked), tracked)[self.layer_of]
        return torch.where(is_dead(var, self.eps), 0.0, recovery_error(mean, var, decay))

    def _read(self) -> tuple[Tensor, Tensor]:
        running = [b["running_mean"] for b in self._buffers] + [b["running_var"] for b in self._buffers]
        tracked = [self._none_tracked if (n := b["num_batches_tracked"]) is None else n for b in self._buffers]
        if not self._one_device:
            running, tracked = ([t.to(self.eps.device) for t in part] for part in (running, tracked))  # type: ignore[union-attr]
        return torch.cat(running), torch.stack(tracked)  # type: ignore[arg-type]

    def _as_tensor(self, momenta: list[list[float | None]]) -> Tensor:
        rows = [[torch.nan if momentum is None else momentum for momentum in row] for row in momenta]
        return torch.tensor(rows, dtype=self.eps.dtype).to(self.eps.device, non_blocking=True)

    def _called(self, momenta_before: list[float | None]) -> tuple[list[int], list[float | None]]:
        momenta_after = [layer.momentum for layer in self.layers.values()]
        if not self.calls.momenta and momenta_after == momenta_before:  # most steps
            return self._calls_by_counter, momenta_before
        calls, momenta = list(self._calls_by_counter), list(momenta_before)
        for index, (layer, before) in enumerate(zip(self.layers.values(), momenta_before, strict=True)):
            recorded = self.calls.momenta.get(layer)
            one_call = recorded == [before] == [layer.momentum] and before != 0 and own_class(layer) in OF_TORCH
            if one_call or (recorded is None and layer.momentum == before):  # the counter knows
                continue
            if layer._buffers["num_batches_tracked"] is None:
                calls[index] = 0
                continue
            if recorded != [layer.momentum]:
                self._recorded.add(layer)
            # Without a record, the layer was not called, or compiled: the momentum of the call is unknown.
            calls[index], momenta[index] = (0, before) if recorded is None else _as_one_call(recorded)
        return calls, momenta

    def _differing(self, snapshot: Snapshot) -> list[str]:
        differs = {}
        for index, (name, layer) in enumerate(self.layers.items()):
            if name in self.compared and self.calls.inputs(layer):
                step = self.recover([snapshot], slice(index, index + 1))
                differs[name] = differs_from_torch(self.calls.inputs(layer), snapshot.tracked[index], step, layer.eps)
        # waits for the device, once for all layers
        verdicts = torch.stack(list(differs.values())).tolist() if differs else []
        return [name for name, verdict in zip(differs, verdicts, strict=True) if verdict]


def _as_one_call(momenta: list[float | None]) -> tuple[int, float | None]:
    if None in momenta:  # mixed calls are unknown: the weight of None depends on the counter, which others may change
        return (len(momenta) if set(momenta) == {None} else 0), None
    # calls at different momenta are one call that moves as much
    moved = 1 - math.prod(1 - m for m in momenta if m is not None)
    return int(moved != 0), momenta[0] if len(momenta) == 1 else moved


def is_spread(layer: _BatchNorm) -> bool:
    """Return whether a layer normalizes over several ranks, so that one rank cannot measure its batch."""
    return (isinstance(layer, SyncBatchNorm) or has_behavior(layer, "sync")) and get_world_size() > 1


def not_recoverable(layer: _BatchNorm) -> str:
    """Return why the batches of a layer cannot be recovered in its present mode; empty if they can."""
    running_mean = layer._buffers["running_mean"]
    if is_frozen(layer) or not layer.training:
        return "frozen"
    if layer.momentum == 0:
        return "momentum 0"
    if running_mean is not None and running_mean.element_size() == 2:
        return "16-bit statistics"
    return "batches not tracked" if layer._buffers["num_batches_tracked"] is None else ""
