"""Ghost BN: in training, the layer normalizes each of several groups of the batch by itself (paper, App. A.5).

Groups are made into channels: of an NCHW tensor whose sample i belongs to group i mod g, ``x.view(N / g, g * C, H, W)``
has each group's values of each channel in a channel of its own, so that one call of torch's kernel, on memory that
was never moved, normalizes all groups. Interleaved groups without such a view are copied until there is one;
contiguous ones are normalized one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behavior import Behavior, has_behavior
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm

Grouping: TypeAlias = Literal["interleaved", "contiguous"]


class Ghost(Behavior):
    """Normalize groups of a training batch separately; the running statistics are still updated once, by all of it.

    A layer that normalizes with stored statistics, because it is in eval mode or frozen, goes on doing so. While a
    population is estimated (`BatchMode`) the layer normalizes whole batches: what that estimate wants is the largest
    batch there is (Table 2), not the one of training.

    Args:
        layers: Qualified name -> layer, to name one that cannot do it.
        size: Most samples in a group; or
        splits: number of groups.
        grouping: Which samples share a group.
    """

    kind = "ghost"

    def __init__(self, layers: dict[str, _BatchNorm], size: int | None, splits: int | None, grouping: Grouping) -> None:
        self.name = f"ghosts of {size}" if size else f"{splits} ghosts"
        self._names = {layer: name for name, layer in layers.items()}
        self._size, self._splits, self._grouping = size, splits, grouping

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Run the layer's own forward with another ``batch_norm``."""
        if not layer.training or has_behavior(layer, "batch mode"):
            return forward(input)
        return replace_batch_norm(self._batch_norm, self._names[layer], forward, input)

    def _batch_norm(self, call: BatchNormCall) -> Tensor:
        groups = self._groups_of(call.input) if call.training else 1
        return call.run() if groups == 1 else _grouped(call, groups, self._grouping)

    def normalization_batch(self, samples: float) -> float:
        """Those of the largest group, where each has two values a channel or more."""
        if math.isnan(samples):  # frozen by a behavior nearer to the layer
            return samples
        return math.ceil(samples / self._number_of_groups(int(samples), 2 * int(samples)))

    def normalization_groups(self, input: Tensor) -> Tensor:
        """The number of each row's ghost."""
        groups = self._groups_of(input)
        if self._grouping == "interleaved":
            return torch.arange(len(input)) % groups
        rows, larger = len(input) // groups, len(input) % groups
        return torch.arange(groups).repeat_interleave(torch.tensor([rows + 1] * larger + [rows] * (groups - larger)))

    def _groups_of(self, input: Tensor) -> int:
        samples = len(range(len(input)))  # range: torch.compile then takes the number for a constant, not for a symbol
        return self._number_of_groups(samples, input.numel() // input.shape[1])

    def _number_of_groups(self, samples: int, values: int) -> int:
        """As few as the size allows, and none of a single value of the ``values`` a channel, which has no variance."""
        wanted = -(-samples // self._size) if self._size else self._splits or 1
        return max(1, min(wanted, samples, values // 2))


def _grouped(call: BatchNormCall, groups: int, grouping: Grouping) -> Tensor:
    """``batch_norm`` in training, group by group; the first ``larger`` groups have one sample more than the others."""
    input, running_mean, running_var, weight, bias, _, momentum, eps = call
    rows, larger = len(input) // groups, len(input) % groups
    means = variances = None
    if running_mean is not None:
        # 16-bit buffers would round the statistics of every group; the kernel takes float32 ones with any input
        dtype = torch.promote_types(running_mean.dtype, torch.float32)
        weight, bias = (p if p is None else p.to(dtype) for p in (weight, bias))
        means, variances = (running_mean.new_zeros(groups, input.shape[1], dtype=dtype) for _ in range(2))

    def normalize(part: Tensor, first: int) -> Tensor:
        """Samples of groups ``first`` and following, ``(samples of a group, groups * C, ...)``."""
        alike = part.shape[1] // input.shape[1]
        mean, var = (s if s is None else s[first : first + alike].flatten() for s in (means, variances))
        scale, shift = (p if p is None else p.expand(alike, -1).flatten() for p in (weight, bias))
        return F.batch_norm(part, mean, var, scale, shift, True, 1.0, eps)

    if grouping == "contiguous":
        runs = input.split([rows + 1] * larger + [rows] * (groups - larger))
        output = torch.cat([normalize(run, first) for first, run in enumerate(runs)])
    else:
        output = _interleaved(input, groups, normalize)
    if running_mean is not None and running_var is not None and means is not None and variances is not None:
        space = input.numel() // (len(input) * input.shape[1])
        whole = _whole(
            [
                (means[:larger], variances[:larger], (rows + 1) * space),
                (means[larger:], variances[larger:], rows * space),
            ]
        )
        for running, new in zip((running_mean, running_var), whole, strict=True):
            running.copy_(running.to(new.dtype).lerp(new, momentum))
    # autograd sees no view in it: an activation that then works in place, on a view, would copy gradients
    unviewed: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return unviewed


def _interleaved(input: Tensor, groups: int, normalize: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Normalize groups of which sample i belongs to number i mod ``groups``, as channels."""
    rows, larger = len(input) // groups, len(input) % groups
    # where channels lie side by side (channels_last) copies keep them so: runs of C values move faster than single ones
    last = input.ndim > 2 and not input.is_contiguous() and input.movedim(1, -1).is_contiguous()

    def run(x: Tensor, first: int) -> Tensor:
        """Samples ``(samples of a group, groups, C, ...)``, or C last."""
        y: Tensor  # for torch leaves unflatten without a type
        if last:
            y = normalize(x.movedim(1, -2).flatten(-2).movedim(-1, 1), first)
            y = y.movedim(1, -1).unflatten(-1, (x.shape[1], x.shape[-1])).movedim(-2, 1)
        else:
            y = normalize(x.flatten(1, 2), first).unflatten(1, x.shape[1:3])
        return y

    x = input.movedim(1, -1) if last else input
    if not larger:
        y = run(x.unflatten(0, (rows, groups)), 0).flatten(0, 1)
    else:  # the last row is short: those groups that reach into it, then the others
        full, short = x.split([rows * groups, larger])
        reaching, others = full.unflatten(0, (rows, groups)).split([larger, groups - larger], 1)
        reached = run(torch.cat([reaching, short.unsqueeze(0)]), 0)
        full, short = reached.split([rows, 1])
        y = torch.cat([torch.cat([full, run(others, larger)], 1).flatten(0, 1), short.squeeze(0)])
    return y.movedim(-1, 1) if last else y


def _whole(parts: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of everything, from those of groups, ``(groups, C)``, and each group's count."""
    (total, mean, var), *others = (_of_equal_groups(*part) for part in parts if len(part[0]))
    for count, other_mean, other_var in others:
        total += count
        share = count / total
        spread = (other_mean - mean).square()
        mean, var = mean.lerp(other_mean, share), var.lerp(other_var, share).add(spread, alpha=share * (1 - share))
    return mean, var * (total / (total - 1))


def _of_equal_groups(means: Tensor, variances: Tensor, count: int) -> tuple[int, Tensor, Tensor]:
    """Count, mean and biased variance of several groups of ``count`` values a channel, whose variance is unbiased."""
    between, mean = torch.var_mean(means, 0, correction=0)
    return count * len(means), mean, between.add(variances.mean(0), alpha=(count - 1) / count)
