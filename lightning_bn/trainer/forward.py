"""The forward of a pass: the ways that a batch reaches the model, and checks that a module supports them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.ranks import OUT_OF_MEMORY
from lightning_bn.functional.precise import call_model
from lightning_bn.lockstep.scheduler import LockstepError
from lightning_bn.trainer.context import PassContext, batch_domain, set_modes
from lightning_bn.trainer.failures import located
from lightning_bn.trainer.isolation import isolate

Forward: TypeAlias = Literal["training_step", "forward"] | Callable[[LightningModule, Any], Any]
"""The training step, ``forward``, or a function of module and batch."""


class NumberedBatch(NamedTuple):
    """Holds a batch of a pass, its number for messages, and its number of samples."""

    number: int
    batch: Any
    samples: int


def numbered(batches: Iterator[Any], batch_size_fn: BatchSizeFn) -> Iterator[NumberedBatch]:
    """Number the batches of a pass and count their samples; an error names the batch."""
    for number in itertools.count():
        try:
            batch = next(batches)
            samples = batch_size_fn(batch)
        except StopIteration:
            return
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            raise located(error, f"batch {number} of the pass could not be read")  # noqa: B904 - it is its cause
        yield NumberedBatch(number, batch, samples)


@contextmanager
def isolated_forward(forward: Forward, context: PassContext, estimate: bool) -> Iterator[Callable[[Any], None]]:
    """Yield a function of (number, batch, ...) that runs the fixed model on a batch and restores everything.

    Its errors name the batch. With ``estimate``, the layers of the context are in train mode before each forward.
    """
    trainer, module = context.trainer, context.module
    with_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def run_training_step(number: int, batch: Any) -> None:
        try:
            module.training_step(*((batch, number) if with_index else (batch,)))
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise RuntimeError(
                    f"{type(module).__name__}.training_step needs gradients itself, and a pass runs without: pass "
                    "forward='forward' or a function of module and batch."
                ) from error
            raise

    def run(item: Any) -> None:
        number, batch, *_ = item
        begin()
        with fixed(), batch_domain(trainer, batch):
            try:
                if forward == "training_step":
                    with trainer.precision_plugin.train_step_context():
                        run_training_step(number, batch)
                else:
                    with trainer.precision_plugin.forward_context():
                        (forward if callable(forward) else call_model)(module, batch)
            except (LockstepError, *OUT_OF_MEMORY):  # their messages are complete
                raise
            except Exception as error:
                how = forward if isinstance(forward, str) else "the forward function"
                raise located(error, f"batch {number} of the pass failed in {how}")  # noqa: B904 - it is its cause

    estimated = context.layers.values() if estimate else ()
    with (
        isolate(trainer, module) as fixed,
        set_modes(context.modes, forward == "training_step", estimated) as begin,
    ):
        yield run


def check_forward_argument(forward: Any) -> None:
    """Raise ValueError for a value that is not in `Forward`."""
    if not callable(forward) and forward not in ("training_step", "forward"):
        raise ValueError(f"forward must be 'training_step', 'forward' or a function but is {forward!r}.")


def check_forward(forward: Forward, module: LightningModule, owner: str) -> None:
    """Raise ValueError, with an alternative, if a pass of the callback ``owner`` cannot run the module."""
    name = type(module).__name__
    if callable(forward):
        mismatch = _mismatch(forward, module, None)
        if mismatch:
            raise ValueError(f"{owner}: forward must be a function of module and batch, and is not: {mismatch}.")
    elif forward == "forward":
        if not _has_forward(module):
            raise ValueError(
                f"{owner}(forward='forward'): {name} defines no forward. Pass a function of module and batch, such as "
                f"{example_forward(module, owner)}."
            )
    elif not module.automatic_optimization:
        raise ValueError(
            f"{name} optimizes manually, so its training_step would take optimizer steps: pass forward='forward' or a "
            f"function of module and batch, such as {example_forward(module, owner)}."
        )
    elif is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{name}.training_step takes a dataloader_iter and fetches batches itself: pass forward='forward' or a "
            f"function of module and batch, such as {example_forward(module, owner)}."
        )


def check_call(forward: Forward, module: LightningModule, batch: Any, owner: str) -> None:
    """Raise ValueError, with an alternative, if ``forward="forward"`` cannot call the module on a batch."""
    if forward != "forward":
        return
    if isinstance(batch, Mapping):
        arguments = f"the batch's keys as arguments ({', '.join(map(str, batch))})"
        are_names = all(isinstance(key, str) for key in batch)
        mismatch = _mismatch(module.forward, **batch) if are_names else "the keys are not names"
        call = f"module(batch[{_data_key(module, batch)!r}])"
    else:
        several = isinstance(batch, (tuple, list))
        arguments = f"{'the first element of ' if several else ''}the batch"
        mismatch = _mismatch(module.forward, batch[0] if several else batch)
        call = "module(*batch)" if several else "module(batch)"
    if mismatch:
        raise ValueError(
            f"forward='forward' calls {type(module).__name__}.forward with {arguments}, which does not fit: "
            f"{mismatch}. Pass a function of module and batch, such as {owner}(forward=lambda module, batch: {call})."
        )


def example_forward(module: LightningModule, owner: str, child: str | None = None) -> str:
    """Return example code for a message: the callback with a function that runs the module and a ``child``.

    The default child is the last one with BatchNorm layers, which is more often a discriminator than a generator.
    """
    children = [n for n, m in module.named_children() if any(isinstance(x, _BatchNorm) for x in list(m.modules())[1:])]
    if child is None and (len(children) > 1 or (children and not _has_forward(module))):
        child = children[-1]
    calls = ["module(batch)"] if _has_forward(module) or not child else []
    calls += [f"module.{child}(batch)"] if child else []
    both = ", ".join(calls)
    return f"{owner}(forward=lambda module, batch: {both if len(calls) == 1 else f'({both})'})"


def _has_forward(module: LightningModule) -> bool:
    # not by Lightning's is_overridden, which does not know pytorch_lightning's modules
    name = getattr(type(module).forward, "__qualname__", "")
    return "forward" in vars(module) or not name.startswith(("LightningModule.", "_forward_unimplemented"))


def _data_key(module: LightningModule, batch: Mapping[Any, Any]) -> Any:
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        names = []
    return next((key for key in batch if key in names), next(iter(batch), 0))


def _mismatch(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled functions have none
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""
