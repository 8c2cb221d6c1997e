"""BatchNorm layers as people write them, each with the truth: what its ``batch_norm`` normalizes, written plainly.

Every one stands in the same small `Net`, between two convolutions and in front of a plain layer ``last``, which sees
what it makes of its input.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.truth import rows_of

CHANNELS, LENGTH = 4, 6


class Transposed(nn.BatchNorm1d):
    """Of (N, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Masked(nn.BatchNorm1d):
    """Of (N, L, C) and a mask (N, L): what is padding is neither normalized nor counted."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[mask] = super().forward(x[mask])
        return y


@dataclass
class Sparse:
    """As libraries for point clouds have it: features (M, C) and whose they are."""

    features: Tensor
    where: Any = None


class OfSparse(nn.BatchNorm1d):
    def forward(self, x: Sparse) -> Sparse:
        return Sparse(super().forward(x.features), x.where)


class Padded(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1)))[..., 1:-1]


class Rows(nn.BatchNorm1d):
    """Of (N, L, C), as (N * L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)


class ByHand(nn.BatchNorm1d):
    """Normalizes and keeps statistics itself, by assignment, as tutorials do."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
            if self.track_running_stats and self.momentum:
                self.keep(mean.detach(), var.detach(), x.numel() / x.shape[1])
        else:
            mean, var = self.running_mean, self.running_var
        return self.normalized(x, mean, var)

    def normalized(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = (x - mean[:, None]) / (var[:, None] + self.eps).sqrt()
        return y * self.weight[:, None] + self.bias[:, None]

    def keep(self, mean: Tensor, var: Tensor, n: float) -> None:
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var * n / (n - 1)


class InPlace(ByHand):
    def keep(self, mean: Tensor, var: Tensor, n: float) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)


class Biased(ByHand):
    def keep(self, mean: Tensor, var: Tensor, n: float) -> None:
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)


class Inverted(ByHand):
    """With the momentum of other frameworks."""

    def keep(self, mean: Tensor, var: Tensor, n: float) -> None:
        self.running_mean.mul_(self.momentum).add_((1 - self.momentum) * mean)
        self.running_var.mul_(self.momentum).add_((1 - self.momentum) * var * n / (n - 1))


class InData(ByHand):
    def keep(self, mean: Tensor, var: Tensor, n: float) -> None:
        self.running_mean.data = self.running_mean.lerp(mean, self.momentum)
        self.running_var.data = self.running_var.lerp(var, self.momentum)


class Calls(ByHand):
    """Keeps statistics itself, and has ``batch_norm`` normalize."""

    def normalized(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        if self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


class CallsInPlace(Calls, InPlace):
    pass


class CallsInverted(Calls, Inverted):
    pass


class Counting(nn.BatchNorm1d):
    """Counts batches itself, and has buffers, lists and numbers of its own to do it with."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("batches", torch.zeros(()))
        self.calls, self.sizes = 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
            self.num_batches_tracked = self.num_batches_tracked + 1
            self.calls += 1
            self.sizes = [*self.sizes, len(x)]
        momentum = 1 / max(self.calls, 1)
        statistics, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        return F.batch_norm(x, *statistics, *affine, self.training, momentum, self.eps)


class OfTorch(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        affine, statistics = (self.weight, self.bias), (self.running_mean, self.running_var)
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, *affine, *statistics, self.training, self.momentum, self.eps, cudnn)


class Halves(nn.BatchNorm1d):
    """Normalizes two halves of a batch, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.half(x) for x in x.chunk(2)])

    def half(self, x: Tensor) -> Tensor:
        named = {name: getattr(self, name) for name in ("weight", "bias", "training", "momentum", "eps")}
        return F.batch_norm(x, self.running_mean, self.running_var, **named)


class Ghost(nn.BatchNorm2d):
    """DAWNBench's: as many buffers as there are channels times splits."""

    def __init__(self, channels: int, splits: int = 2) -> None:
        super().__init__(channels)
        self.splits = splits
        self.register_buffer("running_mean", torch.zeros(channels * splits))
        self.register_buffer("running_var", torch.ones(channels * splits))

    def train(self, mode: bool = True) -> nn.Module:
        if self.training and not mode:
            for key in ("running_mean", "running_var"):
                setattr(self, key, getattr(self, key).view(self.splits, -1).mean(0).repeat(self.splits))
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        mean, var = self.running_mean, self.running_var
        if self.training or not self.track_running_stats:
            weight, bias = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
            x = x.reshape(-1, c * self.splits, h, w)
            return F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps).view(n, c, h, w)
        return F.batch_norm(x, mean[:c], var[:c], self.weight, self.bias, False, self.momentum, self.eps)


class WithChild(nn.BatchNorm1d):
    """Normalizes part of its channels' values by a child of its own class."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.child = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.child(x * x))


class MaskedByHand(ByHand):
    """Of rows (N, C) and a mask (N): without padding it does what torch's own would."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[mask] = super().forward(x[mask][..., None])[..., 0]
        return y


class Activated(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Unbiased(ByHand):
    """Normalizes with the unbiased variance, as nothing else does."""

    def normalized(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        n = x.numel() / x.shape[1]
        return super().normalized(x, mean, var * n / (n - 1) if self.training else var)


class Sometimes(ByHand):
    """Calls ``batch_norm`` for small batches only, and else has an activation as well."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            return super().forward(x).relu()
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


Given = Callable[[Tensor, Tensor], dict[str, list[Tensor]]]
Use = Callable[[Any, Tensor, Tensor], Tensor]


class HandWritten(NamedTuple):
    """A layer of the zoo.

    Attributes:
        make: Makes one of so many channels.
        use: Calls it on what the net has there, ``(N, C, L)``, with the net's own input beside it.
        given: From the same, what is normalized at each call of ``batch_norm``, ``(count, C)``, by what stands behind
            the layer's name; None where there is no telling.
        in_eval: The layer that it is like in eval mode, where that is another; None where there is no telling.
        parts: Parts of a batch that are normalized apart.
        is_seen: Whether it calls ``batch_norm``.
    """

    make: Callable[[int], _BatchNorm]
    use: Use = lambda bn, h, x: bn(h)
    given: Given | None = lambda h, x: {"": [rows_of(h)]}
    in_eval: str | None = "itself"
    parts: int = 1
    is_seen: bool = True


def mask_of(x: Tensor) -> Tensor:
    return x[:, 0] > -0.5


def last(bn: Any, h: Tensor, x: Tensor) -> Tensor:
    return bn(h.transpose(1, 2)).transpose(1, 2)


def masked(bn: Any, h: Tensor, x: Tensor) -> Tensor:
    return bn(h.transpose(1, 2), mask_of(x)).transpose(1, 2)


def masked_rows(bn: Any, h: Tensor, x: Tensor) -> Tensor:
    y = bn(h.transpose(1, 2).reshape(-1, CHANNELS), mask_of(x).reshape(-1))
    return y.view(len(h), -1, CHANNELS).transpose(1, 2)


def unpadded(h: Tensor, x: Tensor) -> dict[str, list[Tensor]]:
    return {"": [h.transpose(1, 2)[mask_of(x)].double()]}


def sparse(bn: Any, h: Tensor, x: Tensor) -> Tensor:
    y = bn(Sparse(h.transpose(1, 2).reshape(-1, CHANNELS)))
    return y.features.view(len(h), -1, CHANNELS).transpose(1, 2)


def as_image(bn: Any, h: Tensor, x: Tensor) -> Tensor:
    return bn(h[..., None])[..., 0]


def splits(h: Tensor, x: Tensor) -> dict[str, list[Tensor]]:
    first, second = h.chunk(2)
    return {"": [rows_of(first)], ".aux_bn.0": [rows_of(second)]}


def squared(h: Tensor, x: Tensor) -> dict[str, list[Tensor]]:
    """What a `WithChild` is given whose scales and shifts are 1 and 0."""
    squares = rows_of(h * h)
    return {"": [rows_of(h) + F.batch_norm(squares, None, None, training=True)], ".child": [squares]}


ZOO: dict[str, HandWritten] = {
    "plain": HandWritten(nn.BatchNorm1d),
    "BatchNorm2d": HandWritten(nn.BatchNorm2d, as_image),
    "transposed": HandWritten(Transposed, last),
    "masked": HandWritten(Masked, masked, unpadded),
    "masked, arguments by name": HandWritten(
        Masked, lambda bn, h, x: bn(mask=mask_of(x), x=h.transpose(1, 2)).transpose(1, 2), unpadded
    ),
    "container": HandWritten(OfSparse, sparse),
    "padded": HandWritten(Padded, given=lambda h, x: {"": [rows_of(F.pad(h, (1, 1)))]}),
    "rows": HandWritten(Rows, last),
    "by hand, by assignment": HandWritten(ByHand, is_seen=False),
    "by hand, in place": HandWritten(InPlace, is_seen=False),
    "by hand, biased": HandWritten(Biased, is_seen=False),
    "by hand, inverted momentum": HandWritten(Inverted, is_seen=False),
    "by hand, in data": HandWritten(InData, is_seen=False),
    "own statistics, by assignment": HandWritten(Calls),
    "own statistics, in place": HandWritten(CallsInPlace),
    "own statistics, inverted momentum": HandWritten(CallsInverted),
    "counts itself": HandWritten(Counting),
    "torch.batch_norm": HandWritten(OfTorch),
    "two halves": HandWritten(Halves, given=lambda h, x: {"": list(map(rows_of, h.chunk(2)))}, parts=2),
    "DAWNBench's ghost": HandWritten(
        Ghost, as_image, lambda h, x: {"": [rows_of(torch.cat([h[::2], h[1::2]], 1))]}, None
    ),
    "timm BatchNormAct2d": HandWritten(timm.layers.BatchNormAct2d, as_image),
    "timm SplitBatchNorm2d": HandWritten(timm.layers.SplitBatchNorm2d, as_image, splits, "BatchNorm2d", parts=2),
    "timm SyncBatchNormAct": HandWritten(SyncBatchNormAct, as_image),
    "SyncBatchNorm, no momentum": HandWritten(lambda c: nn.SyncBatchNorm(c, momentum=None)),
    "a child": HandWritten(WithChild, given=squared),
    "by hand, masked": HandWritten(MaskedByHand, masked_rows, None, None, is_seen=False),
    "by hand, activated": HandWritten(Activated, given=None, in_eval=None, is_seen=False),
    "by hand, unbiased": HandWritten(Unbiased, given=None, in_eval="plain", is_seen=False),
    "by hand, sometimes": HandWritten(Sometimes, given=None, in_eval=None, is_seen=False),
}
TRUE = [name for name, entry in ZOO.items() if entry.given]
UNTOLD = [name for name, entry in ZOO.items() if not entry.given]


class Net(nn.Module):
    """Convolution, a layer of the zoo, convolution, plain layer."""

    def __init__(self, entry: HandWritten) -> None:
        super().__init__()
        self.entry = entry
        self.inside, self.bn = nn.Conv1d(3, CHANNELS, 1), entry.make(CHANNELS)
        self.outside, self.last = nn.Conv1d(CHANNELS, 3, 1), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.outside(self.entry.use(self.bn, self.inside(x), x)))


def batches(sizes: Sequence[int] = (2, 2, 2, 2, 2, 2)) -> list[Tensor]:
    """Inputs of a `Net` that differ from each other in mean and variance; the first is of positive values."""
    found = [torch.randn(n, 3, LENGTH) * (1 + torch.rand(1)) + torch.randn(3, 1) for n in sizes]
    return [found[0].abs(), *found[1:]]


def together(entry: HandWritten, group: Sequence[Tensor]) -> Tensor:
    """One batch of several, in which each part that is normalized apart has its share of all of them."""
    return torch.cat([part for parts in zip(*(x.chunk(entry.parts) for x in group), strict=True) for part in parts])


def oracle(net: Net, in_eval: bool = False) -> Net:
    """A copy in float64 that normalizes with the statistics of each batch, and else as in eval mode if asked for."""
    twin = copy.deepcopy(net).double()
    if in_eval and twin.entry.in_eval != "itself":
        twin.entry = ZOO[str(twin.entry.in_eval)]
        twin.bn = twin.entry.make(CHANNELS).double()
    for layer in twin.modules():
        layer.training = isinstance(layer, _BatchNorm)
    return twin


def truth(net: Net, groups: Sequence[Sequence[Tensor]], in_eval: bool = False) -> dict[str, Tensor]:
    """What each layer normalizes, ``(count, C)``, in float64, if the batches of each group are one batch."""
    twin = oracle(net, in_eval)
    assert twin.entry.given is not None
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for group in groups:
            x = together(twin.entry, group).double()
            h = twin.inside(x)
            for name, rows in twin.entry.given(h, x).items():
                found.setdefault(f"bn{name}", []).extend(rows)
            found.setdefault("last", []).append(rows_of(twin.outside(twin.entry.use(twin.bn, h.clone(), x))))
    return {name: torch.cat(rows) for name, rows in found.items()}


def state(net: nn.Module) -> dict[str, Any]:
    """All that a measurement leaves as it is: classes, modes, attributes; buffers but for the running statistics."""
    found: dict[str, Any] = {}
    for name, m in net.named_modules():
        plain = {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, list, type(None)))}
        buffers = {k: v if v is None else v.tolist() for k, v in m._buffers.items() if not k.startswith("running_")}
        found[name] = type(m), sorted(vars(m)), plain, buffers
    return found
