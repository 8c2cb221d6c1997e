"""Ghost BN: normalize groups of the training batch separately (paper, App. A.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.checks import check_int
from lightning_bn.layers.behavior import Behavior, Handle, behaviors_of, has_behavior, own_class
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, changeable_layers
from lightning_bn.layers.override import PLAIN, BatchNormCall, plain_call, replace_batch_norm

Grouping: TypeAlias = Literal["interleaved", "contiguous"]


def ghost_bn(
    model: nn.Module,
    *,
    size: int | None = None,
    splits: int | None = None,
    grouping: Grouping = "interleaved",
    layers: Layers = None,
) -> Handle:
    r"""Make BatchNorm layers normalize groups ("ghosts") of the training batch, each with its own statistics.

    For sample $i$ in group $B_k$: $y_i = \gamma (x_i - \mu_{B_k}) / \sigma_{B_k} + \beta$. Only normalization in
    training changes: running statistics are updated once per forward, from the whole batch, and `precise_bn` normalizes
    whole batches. A batch of $N$ samples is divided into $\lceil N / size \rceil$ or ``splits`` groups, whose sizes
    differ by at most one (33 samples at ``size=32``: 17 and 16), each with at least two values per channel.

    It regularizes large device batches (more than about 128 samples), and separates samples that leak information
    about each other. It does not help small ones: groups of 8 or fewer cost accuracy (paper, Fig. 5).
    ``torch.compile`` recompiles for each new batch size. Costs are in benchmarks/RESULTS.md.

    Args:
        model: The model.
        size: Maximum number of samples in a group; the paper uses 32. Give either this or ``splits``.
        splits: Number of groups.
        grouping: ``"interleaved"``: sample i is in group i modulo the number of groups, which separates neighbors in an
            ordered batch. ``"contiguous"``: groups are runs of samples.
        layers: Glob patterns over qualified layer names; None selects every BatchNorm layer.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to normalize whole batches again.

    Raises:
        ValueError: If not exactly one of ``size`` and ``splits`` is given, an argument is out of range, a pattern
            matches nothing, or a layer has a conflicting behavior (`ghost_bn`, `sync_bn`, `domain_bn`).
        TypeError: If a layer is a `SyncBatchNorm`; in its first forward, if its class does not call
            ``torch.nn.functional.batch_norm``.

    Example:
        >>> import torch
        >>> from lightning_bn import ghost_bn
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> x = torch.tensor([[0.0], [10.0], [2.0], [14.0]])
        >>> with ghost_bn(model, size=2):  # samples 0 and 2, samples 1 and 3
        ...     model(x).flatten()
        tensor([-1.0000, -1.0000,  1.0000,  1.0000], grad_fn=<...>)
        >>> model[0].running_mean  # 0.9 * 0 + 0.1 * 6.5
        tensor([0.6500])
    """
    check_grouping(size, splits, grouping)
    chosen = changeable_layers(model, layers)
    check_conflicts(chosen, "ghost", model)
    return Handle(chosen.values(), Ghost(chosen, size, splits, grouping))


def check_grouping(size: int | None, splits: int | None, grouping: str) -> None:
    """Validate the arguments of `ghost_bn` that divide a batch."""
    if (size is None) == (splits is None):
        raise ValueError(f"Give either size= or splits=, not size={size!r} and splits={splits!r}.")
    for name, number in (("size", size), ("splits", splits)):
        if number is not None:
            check_int(name, number, at_least=1)
    if grouping not in get_args(Grouping):
        raise ValueError(f"grouping must be one of {', '.join(map(repr, get_args(Grouping)))} but is {grouping!r}.")


class Ghost(Behavior):
    """Normalizes groups of a training batch separately. In batch mode (`precise_bn`) and eval mode it does nothing."""

    kind = "ghost"

    def __init__(self, layers: dict[str, _BatchNorm], size: int | None, splits: int | None, grouping: Grouping) -> None:
        self.name = f"ghosts of {size}" if size else f"{splits} ghosts"
        self._names = {layer: name for name, layer in layers.items()}
        self._plain = {layer for layer in layers.values() if own_class(layer) in PLAIN}
        self._size, self._splits, self._grouping = size, splits, grouping

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        if not layer.training or has_behavior(layer, "batch mode"):
            return forward(input)
        if layer not in self._plain or len(behaviors_of(layer)) > 1:
            return replace_batch_norm(self._batch_norm, self._names[layer], forward, input)
        # the known forward of torch's own classes, without the cost of a TorchFunctionMode
        layer._check_input_dim(input)
        call = plain_call(layer, input)
        if layer.track_running_stats and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if layer.momentum is None:
                call = call._replace(momentum=1 / float(layer.num_batches_tracked))
        return self._batch_norm(call)

    def normalization_batch(self, samples: float) -> float:
        """Samples of the largest group, if each sample has at least two values per channel."""
        if math.isnan(samples):  # frozen by an inner behavior
            return samples
        return math.ceil(samples / self._number_of_groups(int(samples), 2 * int(samples)))

    def normalization_groups(self, input: Tensor) -> Tensor:
        """The group number of each row."""
        samples = len(input)
        groups = self._number_of_groups(samples, input.numel() // input.shape[1])
        rows, larger = divmod(samples, groups)
        numbers = torch.arange(samples, device=input.device)
        if self._grouping == "interleaved":
            return numbers % groups
        # the first ``larger`` groups have rows + 1 samples: of the two quotients, the true one is always the larger
        return torch.maximum(numbers // (rows + 1), (numbers - larger) // rows)

    def _batch_norm(self, call: BatchNormCall) -> Tensor:
        x, values = call.input, call.values
        samples = len(range(len(x)))  # range: torch.compile then takes the number for a constant, not for a symbol
        groups = self._number_of_groups(samples, values) if call.training else 1
        if groups == 1:
            return call.run()
        rows, larger = divmod(samples, groups)
        wide = x.dtype if x.dtype.itemsize > 2 else torch.float32
        sizes = [rows + 1] * larger + [rows] * (groups - larger)
        counts = x.new_tensor([[size * (values // samples)] for size in sizes], dtype=wide) if larger else None
        if self._grouping == "contiguous":
            output, mean, var = _batch_norm_of_chunks(call, sizes, wide)
        elif counts is None and x.is_contiguous():
            output, mean, var = _batch_norm_of_view(call, groups, wide)
        else:
            counts = x.new_full((groups, 1), values / groups, dtype=wide) if counts is None else counts
            function = _differentiable if torch.compiler.is_compiling() else _GroupedBatchNorm.apply
            output, mean, var = function(x, call.weight, call.bias, self.normalization_groups(x), counts, call.eps)
        if call.running_mean is not None and call.running_var is not None:
            with torch.no_grad():
                whole_mean, whole_var = _whole(mean, var, counts, values)
                call.running_mean.lerp_(whole_mean.to(call.running_mean.dtype), call.momentum)
                call.running_var.lerp_(whole_var.to(call.running_var.dtype), call.momentum)
        return output

    def _number_of_groups(self, samples: int, values: int) -> int:
        """As few as the size allows, with at least two of the ``values`` per channel in each: one has no variance."""
        wanted = -(-samples // self._size) if self._size else self._splits or 1
        return max(1, min(wanted, samples, values // 2))


def _batch_norm_of_view(call: BatchNormCall, groups: int, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Interleaved groups of equal size as channels of a view: one call of torch's kernel normalizes all of them."""
    x, _, _, weight, bias, *_ = call
    channels = groups * x.shape[1]
    count = x.numel() / channels
    # 16-bit statistics would be rounded for each group; the kernel takes float32 ones with any input
    mean, var = x.new_zeros(2, channels, dtype=wide).unbind()
    scale, shift = (p if p is None else p.to(mean.dtype).repeat(groups) for p in (weight, bias))
    y = F.batch_norm(x.view(-1, channels, *x.shape[2:]), mean, var, scale, shift, True, 1.0, call.eps)
    # no view for autograd: behind one, an activation that works in place would copy gradients
    y = torch.ops.aten._unsafe_view(y, x.shape)
    return y, mean.view(groups, -1), var.view(groups, -1) * ((count - 1) / count)


def _batch_norm_of_chunks(call: BatchNormCall, sizes: list[int], wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous groups one after the other, by torch's kernel."""
    x, _, _, weight, bias, *_ = call
    mean, var = x.new_zeros(2, len(sizes), x.shape[1], dtype=wide).unbind()
    weight, bias = (p if p is None else p.to(mean.dtype) for p in (weight, bias))
    chunks = [
        F.batch_norm(chunk, m, v, weight, bias, True, 1.0, call.eps)
        for chunk, m, v in zip(x.split(sizes), mean, var, strict=True)
    ]
    counts = x.new_tensor([[size * (call.values // len(x))] for size in sizes], dtype=mean.dtype)
    return torch.cat(chunks), mean, var * ((counts - 1) / counts)


def _whole(mean: Tensor, var: Tensor, counts: Tensor | None, values: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the whole batch from those of groups, biased; without counts they are equal."""
    if counts is None:
        groups = len(mean)  # sum / (groups - groups / values) is the unbiased part of the groups' means
        between, whole = torch.var_mean(mean, 0, correction=groups / values)
        return whole, between.add_(var.mean(0), alpha=values / (values - 1))
    share = counts / values
    whole = (share * mean).sum(0)
    return whole, (share * (var + (mean - whole).square())).sum(0) * (values / (values - 1))


class _GroupedBatchNorm(torch.autograd.Function):
    """Batch norm of arbitrary groups of samples, in any memory layout.

    All passes work on sums per sample. Beside the output, and the gradient of the input, nothing of the input's size
    is allocated: that costs more than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, group: Tensor, counts: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        space = list(range(2, x.ndim))
        mean = _sum_groups(x, group, counts) / counts
        y = x - _expand(mean, group, x)
        squares = torch.linalg.vector_norm(y, dim=space).square() if space else y.square()
        var = _sum_groups(squares, group, counts) / counts
        sigma = (var + eps).sqrt()
        scale = 1 / sigma if weight is None else weight / sigma
        shift = y.new_zeros(1) if bias is None else bias.to(y.dtype)
        torch.addcmul(shift.view(-1, *[1] * len(space)), y, _expand(scale, group, x), out=y)
        ctx.save_for_backward(x, weight, bias, group, counts, mean, sigma, scale)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return y.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, group, counts, mean, sigma, scale = ctx.saved_tensors
        grad, needed = grads[0], ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            y, *_ = _differentiable(x, weight, bias, group, counts, ctx.eps)
            inputs = [t for t, needs in zip((x, weight, bias), needed, strict=False) if needs]
            found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(found) if needs else None for needs in needed[:3]), None, None, None
        grad_x = (x - _expand(mean, group, x)).mul_(grad)
        by_one = _sum_groups(grad, group, counts)
        by_xhat = _sum_groups(grad_x, group, counts) / sigma
        # scale * (grad - by_one / n - xhat * by_xhat / n) as factors of grad, of x and of 1
        of_x = -scale * by_xhat / (sigma * counts)
        of_one = -scale * by_one / counts - of_x * mean
        torch.addcmul(_expand(of_one, group, x), x, _expand(of_x, group, x), out=grad_x)
        grad_x.addcmul_(grad, _expand(scale, group, x))
        _, needs_weight, needs_bias, *_ = needed
        grad_weight, grad_bias = by_xhat.sum(0) if needs_weight else None, by_one.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _differentiable(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, group: Tensor, counts: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`_GroupedBatchNorm` by operations that autograd can differentiate twice and torch.compile fuses."""
    mean = _sum_groups(x, group, counts) / counts
    y = x - _expand(mean, group, x)
    var = _sum_groups(y.square(), group, counts) / counts
    y = y / _expand((var + eps).sqrt(), group, x)
    weight, bias = (p if p is None else p.view(-1, *[1] * (x.ndim - 2)) for p in (weight, bias))
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype), mean, var


def _sum_groups(x: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Sums of each group and channel."""
    sums = x.sum(list(range(2, x.ndim)), dtype=counts.dtype) if x.ndim > 2 else x.to(counts.dtype)
    return sums.new_zeros(len(counts), sums.shape[1]).index_add_(0, group, sums)


def _expand(statistics: Tensor, group: Tensor, like: Tensor) -> Tensor:
    """Statistics of each sample's group, to be broadcast over an input."""
    return statistics[group].view(*like.shape[:2], *[1] * (like.ndim - 2))
