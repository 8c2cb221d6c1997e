"""FrozenBN: training normalizes with the same constant statistics as evaluation (paper, Sec. 4.3)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from lightning_bn.functional.domain.tensors import AFFINE
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, storing_layers
from lightning_bn.layers.frozen import Frozen


def freeze_bn(model: nn.Module, *, layers: Layers = None, affine: bool = False) -> Handle:
    r"""Make BatchNorm layers normalize with their stored population statistics, in training as in evaluation.

    The layer becomes the constant affine map $y = \gamma (x - \mu_{pop}) / \sigma_{pop} + \beta$ in any mode, and keeps
    its identity and its state dict.

    When it helps: fine-tuning, and the last epochs of training with normalization batches of 8 samples or fewer. When
    it does not: from 16 samples on it costs accuracy (Fig. 5 and 6), and no network trains with it from the start.

    Args:
        model: The model.
        layers: Glob patterns over qualified layer names; None freezes every BatchNorm layer that stores statistics.
        affine: Freeze ``weight`` and ``bias`` as well: their gradients are dropped right before any optimizer steps.
            ``requires_grad`` and DDP are not affected; a parameter without gradient has no weight decay.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to thaw the layers.

    Raises:
        ValueError: If a pattern matches nothing, or a chosen layer stores no statistics.
        TypeError: At its step, if ``affine`` and the optimizer is LBFGS, which moves parameters along past gradients.

    Example:
        >>> import torch
        >>> from lightning_bn import freeze_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8)).train()
        >>> x = torch.randn(16, 4)
        >>> with freeze_bn(model):
        ...     frozen = model(x)
        >>> bool(torch.equal(frozen, model.eval()(x)))
        True
    """
    chosen = storing_layers(model, layers)
    check_conflicts(chosen, "frozen")
    hook = partial(_before_step, affine_of(chosen.values()))
    also = [register_optimizer_step_pre_hook(hook).remove] if affine else []
    return Handle(chosen.values(), Frozen(), also)


def affine_of(layers: Iterable[_BatchNorm]) -> list[Tensor]:
    """The weights and biases of layers, per-domain ones included."""
    keys = ("weight", "bias", *AFFINE)
    return [p for layer in layers for key in keys if (p := layer._parameters.get(key)) is not None]


def check_lbfgs(optimizer: Optimizer, frozen: Iterable[Tensor]) -> None:
    """Raise TypeError if the optimizer is LBFGS and holds frozen parameters: it moves them without a gradient."""
    if isinstance(optimizer, torch.optim.LBFGS) and _frozen_in(optimizer, frozen):
        advice = "Give it parameters without the affine ones, or use another optimizer."
        raise TypeError(f"affine=True cannot freeze parameters of LBFGS, which moves along past gradients. {advice}")


def drop_gradients(optimizer: Optimizer, frozen: Iterable[Tensor]) -> None:
    """Drop the gradients of the frozen parameters that ``optimizer`` is about to step."""
    check_lbfgs(optimizer, frozen)
    for parameter in _frozen_in(optimizer, frozen):
        parameter.grad = None


def _frozen_in(optimizer: Optimizer, frozen: Iterable[Tensor]) -> list[Tensor]:
    ids = {id(p) for p in frozen}
    return [p for group in optimizer.param_groups for p in group["params"] if id(p) in ids]


def _before_step(frozen: Iterable[Tensor], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook before an optimizer's step. It also wraps the closure, which computes gradients within the step."""
    drop_gradients(optimizer, frozen)
    itself, closure, *rest = (*args, None) if len(args) == 1 else args
    closure = kwargs.get("closure", closure)
    if closure is None:
        return None

    def closure_without_gradients() -> Any:
        loss = closure()
        drop_gradients(optimizer, frozen)
        return loss

    others = {key: value for key, value in kwargs.items() if key != "closure"}
    return (itself, closure_without_gradients, *rest), others
