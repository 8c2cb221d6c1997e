"""Recovering what batches a model saw in training from its running statistics, without hooks and without the data.

Around each batch, running statistics are copied before and after; what the batch must have been follows from the two
(see `statistics.recovery`). A few vector operations for all layers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.frozen import is_frozen
from lightning_bn.statistics.drift import is_dead
from lightning_bn.statistics.recovery import recovered, recovery_error, share_kept


class Step(NamedTuple):
    """A batch and the running statistics around it; means and variances, ``(2, C)`` each.

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
        >>> recovery.after_batch().batch.T.round(decimals=3)  # mean and unbiased variance
        tensor([[2., 2.]], dtype=torch.float64)
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.layers = dict(layers)
        self.sizes = [layer.num_features for layer in layers.values()]
        home = next(iter(layers.values())).get_buffer("running_mean").device
        self.layer_of = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes)).to(home)
        eps = torch.tensor([layer.eps for layer in layers.values()], dtype=torch.float64)
        self.eps = eps.to(home, torch.float32 if home.type == "mps" else torch.float64)[self.layer_of]
        self._momenta: list[float | None] = []
        self._momenta_in_tensor: list[float | None] = []
        self._before: tuple[Tensor, Tensor] | None = None

    def before_batch(self) -> None:
        """Call right before a batch reaches the model."""
        self._before = self._read()
        self._momenta = self._momenta_now()

    def after_batch(self) -> Step | None:
        """Call right after it, or never. What it was; None if its beginning was not seen."""
        if self._before is None:
            return None
        (before, tracked), (after, tracked_after) = self._before, self._read()
        self._before = None
        # a momentum that was changed in between says nothing of the one with which the batch was taken in
        same = [a == b for a, b in zip(self._momenta, self._momenta_now(), strict=True)]
        calls = (tracked_after - tracked) * (1.0 if all(same) else torch.tensor(same).to(self.eps))
        kept = share_kept(self._momentum(), calls, tracked)[self.layer_of]
        return Step(before, after, recovered(before, after, kept), kept, (calls > 0)[self.layer_of])

    def abandon(self) -> None:
        """Forget a batch that has begun."""
        self._before = None

    def running(self) -> Tensor:
        """Running means and variances as they are, ``(2, C)``: a copy."""
        return self._read()[0]

    def inaccuracy(self) -> Tensor:
        """Sigma by which a mean recovered now may be off by rounding, ``(C,)``; 0 for dead channels."""
        running, tracked = self._read()
        self._momenta = self._momenta_now()
        kept = share_kept(self._momentum(), torch.ones_like(tracked), tracked)[self.layer_of]
        return torch.where(is_dead(running[1], self.eps), 0.0, recovery_error(running[0], running[1], kept))

    def _read(self) -> tuple[Tensor, Tensor]:
        """Running means and variances, ``(2, C)``, and batches tracked, ``(L,)``: copies."""
        buffers = [layer._buffers for layer in self.layers.values()]
        mean, var = (
            torch.cat([b[kind].to(self.eps.device) for b in buffers])  # type: ignore[union-attr]
            for kind in ("running_mean", "running_var")
        )
        none = self.layer_of.new_zeros(())
        tracked = [none if (count := b["num_batches_tracked"]) is None else count.to(none.device) for b in buffers]
        return torch.stack([mean, var]).to(self.eps.dtype), torch.stack(tracked).to(self.eps)

    def _momenta_now(self) -> list[float | None]:
        return [layer.momentum for layer in self.layers.values()]

    def _momentum(self) -> Tensor:
        """Of each layer, NaN for None; made anew only when one has changed, since that is a copy to the device."""
        if self._momenta != self._momenta_in_tensor:
            self._momenta_in_tensor = self._momenta
            self._momentum_tensor = torch.tensor([torch.nan if m is None else m for m in self._momenta]).to(self.eps)
        return self._momentum_tensor


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
