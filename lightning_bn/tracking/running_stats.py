"""Recovering what batches a model saw in training from its running statistics, without the data.

Around each batch, running statistics are copied before and after; what the batch must have been follows from the two
(see `statistics.recovery`). A few vector operations for all layers together, and for many batches at once.

That takes the number of calls that moved the statistics, and their momenta. A layer that counts one call is taken at
its word, where its statistics have moved. Any other is witnessed: its calls are noted on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behavior import Handle, has_behavior, own_class
from lightning_bn.layers.frozen import is_frozen
from lightning_bn.layers.override import OF_TORCH
from lightning_bn.tracking.drift import is_dead
from lightning_bn.tracking.observed import Witnessed
from lightning_bn.tracking.recovery import ema_decay, recovered, recovery_error

_ONE_BY_COUNTER, _BY_COUNTER = -1, -2
"""In the place of a number of calls: one if the layer's counter says so; as many as it says."""


class RunningStatsBeforeAfter(NamedTuple):
    """What was read around a batch, of all layers.

    Attributes:
        before: Running means, then running variances, before the batch, ``(2C,)``, in the layers' own precision.
        after: The same after it.
        tracked: Batches tracked before it, ``(L,)``.
        calls: Calls of each layer, ``(L,)``; 0 where they, or their momenta, are not known.
        momentum: Of these calls, NaN for None, ``(L,)``; several at other momenta are one that moves as much.
    """

    before: Tensor
    after: Tensor
    tracked: Tensor
    calls: Tensor
    momentum: Tensor


class Step(NamedTuple):
    """A batch and the running statistics around it; means and variances, ``(2, C)`` each. Or many, ``(N, ...)``.

    Attributes:
        before: Running statistics before the batch.
        after: Running statistics after it.
        batch: Statistics of the batch; those of several calls are averaged.
        kept: What was left of the running statistics from before, ``(C,)``.
        called: Channels of the layers that were called, ``(C,)``.
    """

    before: Tensor
    after: Tensor
    batch: Tensor
    kept: Tensor
    called: Tensor


class Recovery:
    """Recovers the batch statistics of layers, whose channels lie side by side in one vector.

    Args:
        layers: Qualified name -> layer; each stores running statistics.

    Attributes:
        layers: These layers.
        sizes: Number of channels of each.
        layer_of: Number of the layer of each channel, ``(C,)``.
        eps: The layer's eps for each channel, ``(C,)``, in the precision and on the device of all results.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> bn = nn.BatchNorm1d(1)
        >>> recovery = Recovery({"bn": bn})
        >>> recovery.before_batch()
        >>> _ = bn(torch.tensor([[1.0], [3.0]]))
        >>> recovery.recover([recovery.after_batch()]).batch.round(decimals=3)  # mean and unbiased variance
        tensor([[[2.],
                 [2.]]], dtype=torch.float64)
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.layers = dict(layers)
        self.sizes = [layer.get_buffer("running_mean").numel() for layer in layers.values()]
        home = next(iter(layers.values())).get_buffer("running_mean").device
        self.layer_of = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes)).to(home)
        eps = torch.tensor([layer.eps for layer in layers.values()], dtype=torch.float64)
        self.eps = eps.to(home, torch.float32 if home.type == "mps" else torch.float64)[self.layer_of]
        self._momenta: list[float | None] = []
        self._on_device: dict[str, tuple[list[float], Tensor]] = {}
        self._witness, self._handle = Witnessed(), Handle((), Witnessed())
        self._witnessed = {layer for layer in layers.values() if own_class(layer) not in OF_TORCH}
        self._starts = [0, *accumulate(self.sizes)]
        self._none_tracked = torch.zeros((), dtype=torch.int64, device=home)
        self._together = all(layer.get_buffer("running_mean").device == home for layer in layers.values())
        self._before: tuple[Tensor, Tensor] | None = None

    def before_batch(self, closely: bool = False) -> None:
        """Call right before a batch reaches the model.

        Args:
            closely: Witness all layers, to find those that need it: now and then, since it has compiled models
                compiled for it, once.
        """
        self.abandon()
        layers = self.layers.values() if closely else self._witnessed
        self._witness.begin()
        self._handle = Handle([layer for layer in layers if not has_behavior(layer, "domain")], self._witness)
        self._before = self._read()
        self._momenta = self._momenta_now()

    def after_batch(self) -> RunningStatsBeforeAfter | None:
        """Call right after it, or never. What was read, for `recover`; None if its beginning was not seen."""
        if self._before is None:
            return None
        # What was read after the batch before is no substitute for this one's `before`: nothing tells that none wrote
        # in between. A batch norm's kernel and `tensor.data` leave `tensor._version` as it is.
        (before, tracked), (after, tracked_after) = self._before, self._read()
        self.abandon()
        number, momenta = self._unwrap_batch_sampler()
        counted, known = tracked_after - tracked, self._tensor("calls", number)
        calls = torch.where(known >= 0, known, counted.where((counted == 1) | (known == _BY_COUNTER), 0))
        return RunningStatsBeforeAfter(before, after, tracked, calls.to(counted), self._momentum(momenta))

    def _unwrap_batch_sampler(self) -> tuple[list[float], list[float | None]]:
        """Of each layer: how many calls there were, or that its counter says so; and at which momentum."""
        calls: list[float] = []
        momenta: list[float | None] = []
        for layer, before in zip(self.layers.values(), self._momenta, strict=True):
            noted, now = self._witness.momenta.get(layer), vars(layer)["momentum"]
            if layer._buffers["num_batches_tracked"] is None:  # `not_recoverable`
                calls.append(0)
                momenta.append(before)
                continue
            if noted is None:  # within a compiled region, or not called
                if before != now:  # which says nothing of the one with which the batch was taken in
                    self._witnessed.add(layer)
                ours = has_behavior(layer, "domain")
                calls.append(0 if before != now else _BY_COUNTER if ours else _ONE_BY_COUNTER)
                momenta.append(before)
                continue
            if noted != [now]:
                self._witnessed.add(layer)
            plain_average = [m for m in noted if m is None]
            if plain_average:  # its weights follow from the counter, which others may have moved in between
                calls.append(len(noted) if len(plain_average) == len(noted) else 0)
                momenta.append(None)
            else:
                moved = 1 - math.prod(1 - m for m in noted if m is not None)
                calls.append(int(moved != 0))
                momenta.append(noted[0] if len(noted) == 1 else moved)
        return calls, momenta

    def recover(self, batches: Sequence[RunningStatsBeforeAfter], layers: slice = slice(None)) -> Step:
        """What batches were, ``N`` of them at once.

        Args:
            batches: What was read around each.
            layers: Some layers, by number; the result holds their channels alone. All by default.
        """
        first, end, _ = layers.indices(len(self.sizes))
        channels = slice(self._starts[first], self._starts[end])
        layer_of = self.layer_of[channels] - first
        before, after = (
            torch.stack([read.view(2, -1)[:, channels] for read in side]).to(self.eps)
            for side in ([b.before for b in batches], [b.after for b in batches])
        )
        tracked, calls, momentum = (
            torch.stack([read[layers] for read in each])
            for each in ([b.tracked for b in batches], [b.calls for b in batches], [b.momentum for b in batches])
        )
        kept = ema_decay(momentum, calls.to(momentum), tracked.to(momentum)).index_select(1, layer_of)
        # of a call at momentum 0 the layer's counter tells nothing
        moved = (before != after).any(1) | is_dead(after[:, 1], self.eps[channels])
        called = (calls > 0).index_select(1, layer_of) & moved
        return Step(before, after, recovered(before, after, kept[:, None]), kept, called)

    def abandon(self) -> None:
        """Forget a batch that has begun, and take back from the layers what they were given for it."""
        self._before = None
        self._handle.undo()

    def running(self) -> Tensor:
        """Running means and variances as they are, ``(2, C)``: a copy."""
        return self._read()[0].view(2, -1).to(self.eps)

    def inaccuracy(self) -> Tensor:
        """Sigma by which a mean recovered now may be off by rounding, ``(C,)``; 0 for dead channels."""
        running, tracked = self.running(), self._read()[1].to(self.eps)
        kept = ema_decay(self._momentum(self._momenta_now()), torch.ones_like(tracked), tracked)[self.layer_of]
        return torch.where(is_dead(running[1], self.eps), 0.0, recovery_error(running[0], running[1], kept))

    def _read(self) -> tuple[Tensor, Tensor]:
        """Running means and variances, ``(2C,)``, and batches tracked, ``(L,)``: copies, twice a step."""
        layers = [layer._buffers for layer in self.layers.values()]
        buffers = [b[kind] for kind in ("running_mean", "running_var") for b in layers]
        tracked = [self._none_tracked if (count := b["num_batches_tracked"]) is None else count for b in layers]
        if not self._together:
            home = self.eps.device
            buffers, tracked = [b.to(home) for b in buffers], [t.to(home) for t in tracked]  # type: ignore[union-attr]
        return torch.cat(buffers), torch.stack(tracked)  # type: ignore[arg-type]

    def _momenta_now(self) -> list[float | None]:
        return [layer.momentum for layer in self.layers.values()]

    def _momentum(self, momenta: list[float | None]) -> Tensor:
        return self._tensor("momentum", [torch.nan if m is None else m for m in momenta])

    def _tensor(self, kind: str, values: list[float]) -> Tensor:
        """A number of each layer; made anew only when one has changed, and without waiting for the device."""
        if kind not in self._on_device or self._on_device[kind][0] != values:
            tensor = torch.tensor(values, dtype=self.eps.dtype).to(self.eps.device, non_blocking=True)
            self._on_device[kind] = values, tensor
        return self._on_device[kind][1]


def not_recoverable(layer: _BatchNorm) -> str:
    """Why a layer's batch statistics cannot be recovered in its present mode; empty if they can."""
    running_mean = layer._buffers["running_mean"]
    if is_frozen(layer) or not layer.training:
        return "frozen"
    if layer.momentum == 0:
        return "momentum 0"
    if running_mean is not None and running_mean.element_size() == 2:
        return "16-bit statistics"
    return "batches not tracked" if layer._buffers["num_batches_tracked"] is None else ""
