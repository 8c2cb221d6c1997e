"""How a batch reaches the model in a pass, and what is refused of that before the first pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.modules.batchnorm import _BatchNorm

Forward: TypeAlias = Literal["training_step", "forward"] | Callable[[LightningModule, Any], Any]
"""How a batch reaches the model: the muted training step, ``forward``, or a function of module and batch."""


def check_forward_argument(forward: Any) -> None:
    """Raise for something that says not how a batch reaches the model.

    Raises:
        ValueError: If it is none of `Forward`.
    """
    if not callable(forward) and forward not in ("training_step", "forward"):
        raise ValueError(f"forward must be 'training_step', 'forward' or a function but is {forward!r}.")


def check_forward(forward: Forward, module: LightningModule, owner: str) -> None:
    """Refuse what cannot be run by a pass of the callback ``owner``, whatever the batch.

    Raises:
        ValueError: Naming the way out.
    """
    name = type(module).__name__
    if callable(forward):
        misfit = _misfit(forward, module, None)
        if misfit:
            raise ValueError(f"{owner}: forward must be a function of module and batch, and is not: {misfit}.")
    elif forward == "forward":
        if not _has_forward(module):
            raise ValueError(
                f"{owner}(forward='forward'): {name} defines no forward. Pass a function of module and batch, such as "
                f"{function_for(module, owner)}."
            )
    elif not module.automatic_optimization:
        raise ValueError(
            f"{name} optimizes manually, so its training_step would take optimizer steps: pass forward='forward' or a "
            f"function of module and batch, such as {function_for(module, owner)}."
        )
    elif is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{name}.training_step takes a dataloader_iter and fetches batches itself: pass forward='forward' or a "
            f"function of module and batch, such as {function_for(module, owner)}."
        )


def check_call(forward: Forward, module: LightningModule, batch: Any, owner: str) -> None:
    """Refuse a batch that ``forward="forward"`` cannot be called on.

    Raises:
        ValueError: Naming what it is called with, and the way out.
    """
    if forward != "forward":
        return
    if isinstance(batch, Mapping):
        arguments = f"the batch's keys as arguments ({', '.join(map(str, batch))})"
        misfit = _misfit(module.forward, **batch) if all(isinstance(k, str) for k in batch) else "they are no names"
        call = f"module(batch[{_data_key(module, batch)!r}])"
    else:
        several = isinstance(batch, (tuple, list))
        arguments = f"{'the first element of ' if several else ''}the batch"
        misfit = _misfit(module.forward, batch[0] if several else batch)
        call = "module(*batch)" if several else "module(batch)"
    if misfit:
        raise ValueError(
            f"forward='forward' calls {type(module).__name__}.forward with {arguments}, which does not fit: "
            f"{misfit}. Pass a function of module and batch, such as {owner}(forward=lambda module, batch: {call})."
        )


def function_for(module: LightningModule, owner: str, child: str | None = None) -> str:
    """A line to copy: the callback with a function that runs the module, and with it a ``child`` of it.

    By default the last child with BatchNorm layers: a GAN's discriminator more often than its generator.
    """
    holding = [
        n for n, m in module.named_children() if any(isinstance(x, _BatchNorm) for x in m.modules() if x is not m)
    ]
    named = child or (holding[-1] if len(holding) > 1 or (holding and not _has_forward(module)) else None)
    calls = ["module(batch)"] if _has_forward(module) or not named else []
    calls += [f"module.{named}(batch)"] if named else []
    both = ", ".join(calls)
    return f"{owner}(forward=lambda module, batch: {calls[0] if len(calls) == 1 else f'({both})'})"


def _has_forward(module: LightningModule) -> bool:
    # not by Lightning's is_overridden, which does not know pytorch_lightning's modules
    own = getattr(type(module).forward, "__qualname__", "")
    return "forward" in vars(module) or not own.startswith(("LightningModule.", "_forward_unimplemented"))


def _data_key(module: LightningModule, batch: Mapping[Any, Any]) -> Any:
    """The key of a batch that is most likely what forward takes: one named as an argument of it, or the first."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        names = []
    return next((key for key in batch if key in names), next(iter(batch), 0))


def _misfit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Why a function cannot be called on these arguments; empty if it can, or does not tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # what is compiled has none
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""
