"""Batch norm of the inputs of several ranks as one batch.

Forward: one all-gather of every rank's moments, which all ranks merge in the same order, to the same bits. Backward:
with xhat the normalized input and n the count of all ranks,

    dx = weight / sigma * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n)

with both sums over all ranks, in one all-reduce. Gradients of weight and bias are this rank's share, as in torch's
SyncBatchNorm. With ``create_graph=True`` the same formula is computed by differentiable operations.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm

from lightning_bn.core.moments import Moments
from lightning_bn.core.ranks import get_world_size, merge_at_once
from lightning_bn.layers.override import BatchNormCall


def synced_batch_norm(call: BatchNormCall, group: dist.ProcessGroup | None) -> Tensor:
    """Run a train-mode ``batch_norm`` call over all ranks of a group, each with any number of rows.

    On CUDA it is torch's SyncBatchNorm. On the CPU, a single value per channel on all ranks is a ValueError.
    """
    input, running_mean, running_var, weight, bias, _, momentum, eps = call
    if torch.is_grad_enabled() and not input.requires_grad and _requires_grad(weight, bias):
        # every input gets a gradient, because all ranks must run the exchange of the backward
        input = input.detach().requires_grad_()
    if not input.is_cuda:
        return cast(Tensor, _BatchNormOverRanks.apply(input, weight, bias, call, group))
    # torch sends the input's dtype if it is empty, but float32 for other 16-bit inputs
    x = input if input.numel() else input.to(_wide(input))
    # the kernels would copy another layout, and hide the input from autograd
    if not any(x.is_contiguous(memory_format=last) for last in (torch.channels_last, torch.channels_last_3d)):
        x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    ranks = get_world_size(group)
    output = _BatchNormOnCuda.apply(x, weight, bias, running_mean, running_var, eps, momentum, group, ranks)
    return cast(Tensor, output).to(input.dtype)


class _BatchNormOverRanks(torch.autograd.Function):  # exchanges in float64, so ranks may differ in dtype
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: BatchNormCall,
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
        for running, value in ((call.running_mean, pooled.mean), (call.running_var, pooled.m2 / max(total - 1, 1))):
            if running is not None and total:
                running.lerp_(value.to(running.dtype), call.momentum)
        mean, var = pooled.mean.to(wide), pooled.var.to(wide)
        ctx.save_for_backward(input, weight, mean, var)
        ctx.eps, ctx.group, ctx.total = call.eps, group, max(total, 1)
        return _normalize(input.to(wide), weight, bias, (mean, var, call.eps)).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(ctx, grads[0], ctx.total), None, None
        x, dy = input.to(mean.dtype), grads[0].to(mean.dtype)
        if x.numel():  # with constant statistics the kernel computes both sums, in one read of x and dy
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
            of_xhat, of_one = (-scale * sums / ctx.total).to(mean.dtype)
            grad_input = _normalize(x, of_xhat, of_one, (mean, var, ctx.eps))
            grad_input.addcmul_(dy, scale.view(-1, *[1] * (x.ndim - 2)))
        return grad_input, sum_dy_xhat if needs_weight else None, sum_dy if needs_bias else None, None, None


class _BatchNormOnCuda(TorchSyncBatchNorm):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *_, ctx.eps, _momentum, ctx.group, _ranks = args
        return TorchSyncBatchNorm.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's kernels have no derivatives
            counts = ctx.saved_tensors[-1]
            return *_differentiable_gradients(ctx, grads[0], max(int(counts.sum()), 1)), *[None] * 6
        return cast("tuple[Tensor | None, ...]", TorchSyncBatchNorm.backward(ctx, *grads))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # every rank's loss depends on the sum
        return cast(Tensor, _SumOverRanks.apply(grads[0], ctx.group)), None


def _differentiable_gradients(ctx: Any, grad: Tensor, total: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    input, weight, mean, *_ = ctx.saved_tensors
    dims, shape = [0, *range(2, input.ndim)], (-1, *[1] * (input.ndim - 2))

    def mean_over_ranks(own: Tensor) -> Tensor:
        return cast(Tensor, _SumOverRanks.apply(own, ctx.group)) / total

    # float64, shifted by the mean as a constant first: squares of a large mean would lose the variance
    x, dy = input.double() - mean.double().view(shape), grad.double()
    x = x - mean_over_ranks(x.sum(dims)).view(shape)
    sigma = (mean_over_ranks(x.square().sum(dims)) + ctx.eps).sqrt()
    xhat = x / sigma.view(shape)
    sum_dy_xhat, sum_dy = (dy * xhat).sum(dims), dy.sum(dims)
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_input = None
    if needs_input:
        of_xhat, of_one = mean_over_ranks(torch.stack([sum_dy_xhat, sum_dy])).unbind()
        scale = 1 / sigma if weight is None else weight.double() / sigma
        grad_input = scale.view(shape) * (dy - of_one.view(shape) - xhat * of_xhat.view(shape))
    return grad_input, sum_dy_xhat if needs_weight else None, sum_dy if needs_bias else None


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: tuple[Tensor, Tensor, float]
) -> Tensor:
    mean, var, eps = statistics
    weight, bias = (p if p is None else p.to(mean.dtype) for p in (weight, bias))
    # in torch's kernel: one read of x
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False) if x.numel() else torch.empty_like(x)


def _requires_grad(*parameters: Tensor | None) -> bool:
    return any(p is not None and p.requires_grad for p in parameters)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
