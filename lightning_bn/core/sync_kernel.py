"""BatchNorm over the batches of several ranks: what one process would compute on all of them as one batch.

Forward: every rank learns count, mean and sum of squared deviations of every other, in one exchange, and merges them in
the same order, to the same bits. Backward: with xhat the normalized input and n the count of all ranks,

    dx = weight / sigma * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n)

where the two sums go over all ranks, in one exchange. Gradients of weight and bias are this rank's own share, as
torch's SyncBatchNorm leaves them: DDP adds them up like those of all other parameters.

Where the gradients are to be differentiated themselves (``create_graph=True``), the same formula is computed with
operations that autograd knows, sums over ranks among them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm

from lightning_bn.core.moments import Moments
from lightning_bn.core.ranks import get_world_size, merge_at_once


def synced_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Train-mode ``torch.nn.functional.batch_norm`` of the inputs of all ranks of ``group`` as one batch.

    Every rank of the group calls this equally often, and runs backward through it if one does; its ``input``, of shape
    ``(N, C, ...)``, may hold any number of rows, none included. On CUDA the function behind torch's SyncBatchNorm does
    it. Statistics of 16-bit inputs are taken in float32. Gradients have gradients of their own.

    Raises:
        ValueError: On every rank, if all inputs together hold one value per channel, which has no variance (CPU).
    """
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (weight, bias)):
        # A rank's empty input may come out of nothing, where those of the others have a history. All ranks have to
        # come to the same exchanges in backward, so here each gets a gradient, wanted or not.
        input = input if input.requires_grad else input.detach().requires_grad_()
    if not input.is_cuda:
        return cast(
            Tensor, _BatchNormOverRanks.apply(input, weight, bias, running_mean, running_var, momentum, eps, group)
        )
    # Of an empty input torch sends zeros in the input's own type, which is not what the others send for 16-bit ones.
    taken = _laid_out(input if input.numel() else input.to(_wide(input)))
    weight = None if weight is None else weight.contiguous()
    output = _BatchNormOnCuda.apply(
        taken, weight, bias, running_mean, running_var, eps, momentum, group, get_world_size(group)
    )
    return cast(Tensor, output).to(input.dtype)


class _BatchNormOverRanks(torch.autograd.Function):
    """Exchanges are in float64, so that ranks may differ in the type of their inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        wide = _wide(input)
        own = Moments.of(input.to(wide)) if input.numel() else Moments.empty(input.shape[1], input.device)
        pooled = merge_at_once(own, group)
        total = int(pooled.count[0])
        if total == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {list(input.shape)} and nothing "
                f"on the other ranks of {get_world_size(group)}."
            )
        for running, value in ((running_mean, pooled.mean), (running_var, pooled.m2 / max(total - 1, 1))):
            if running is not None and total:
                running.lerp_(value.to(running.dtype), momentum)
        mean, var = pooled.mean.to(wide), pooled.var.to(wide)
        ctx.save_for_backward(input, weight, mean, var)
        ctx.eps, ctx.group, ctx.total = eps, group, max(total, 1)
        return _affine(input.to(wide), weight, bias, mean, var, eps).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *_gradients(ctx, grads[0], input, weight, mean, ctx.total), *[None] * 5
        x, dy = input.to(mean.dtype), grads[0].to(mean.dtype)
        if x.numel():  # of constant statistics the kernel takes the two sums, in one read of x and dy
            _, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
                dy, x, None, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        else:
            sum_dy_xhat, sum_dy = torch.zeros_like(mean), torch.zeros_like(mean)
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_input = None
        if needs_input:
            sums = torch.stack([sum_dy_xhat, sum_dy]).double()
            dist.all_reduce(sums, group=ctx.group)
            scale = (var + ctx.eps).rsqrt() if weight is None else (var + ctx.eps).rsqrt() * weight
            by_xhat, by_one = (-scale * sums / ctx.total).to(mean.dtype)
            grad_input = _affine(x, by_xhat, by_one, mean, var, ctx.eps)
            grad_input.addcmul_(dy, scale.view(-1, *[1] * (x.ndim - 2)))
        return grad_input, sum_dy_xhat if needs_weight else None, sum_dy if needs_bias else None, *[None] * 5


class _BatchNormOnCuda(TorchSyncBatchNorm):
    """torch's own, whose kernels have no derivatives: where their results need some, they are not used."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *_, ctx.eps, _momentum, ctx.group, _ranks = args
        return TorchSyncBatchNorm.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            found: tuple[Tensor | None, ...] = TorchSyncBatchNorm.backward(ctx, *grads)
            return found
        input, weight, mean, _, counts = ctx.saved_tensors
        total = max(int(counts.sum()), 1)
        return *_gradients(ctx, grads[0], input, weight, mean, total), *[None] * 6


class _SumOverRanks(torch.autograd.Function):
    """What every rank has of it counts in the losses of all: its gradient is a sum over ranks again."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return cast(Tensor, _SumOverRanks.apply(grads[0], ctx.group)), None


def _gradients(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, total: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, as functions of all they depend on; in float64, which autograd rounds."""
    group = ctx.group
    dims = [0, *range(2, input.ndim)]

    def along(v: Tensor) -> Tensor:
        return v.view(-1, *[1] * (input.ndim - 2))

    # moved by the mean, as a constant: squares of a mean far from zero would swallow the variance
    x, dy = input.double() - along(mean.double()), grad.double()
    x = x - along(_SumOverRanks.apply(x.sum(dims), group) / total)
    sigma = (_SumOverRanks.apply(x.square().sum(dims), group) / total + ctx.eps).sqrt()
    xhat = x / along(sigma)
    sum_dy_xhat, sum_dy = (dy * xhat).sum(dims), dy.sum(dims)
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_input = None
    if needs_input:
        by_xhat, by_one = (_SumOverRanks.apply(torch.stack([sum_dy_xhat, sum_dy]), group) / total).unbind()
        scale = 1 / sigma if weight is None else weight.double() / sigma
        grad_input = along(scale) * (dy - along(by_one) - xhat * along(by_xhat))
    return grad_input, sum_dy_xhat if needs_weight else None, sum_dy if needs_bias else None


def _laid_out(x: Tensor) -> Tensor:
    """In memory as torch's kernels want it; a copy that they made themselves would hide the input from autograd."""
    last = (torch.channels_last, torch.channels_last_3d)
    return x if any(x.is_contiguous(memory_format=layout) for layout in last) else x.contiguous()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sigma * weight + bias``, in one read of ``x``."""
    weight, bias = (p if p is None else p.to(mean.dtype) for p in (weight, bias))
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False) if x.numel() else torch.empty_like(x)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
