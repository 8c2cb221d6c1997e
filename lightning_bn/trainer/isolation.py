"""A neutral zone: what a forward does in here to module, Trainer and random numbers is undone on leaving.

Modules work on scratch copies of what they own (parameters, buffers, metric states, lists, counters), and get the
originals back; so nothing has to be copied back, and an exception leaves nothing half done.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_bn.core.rng import GENERATORS, preserve_rng_state
from lightning_bn.trainer.parameters import FixedModel, preserve_parameters
from lightning_bn.trainer.stateful_objects import find_stateful_objects, is_lightning_module, snapshot_state

_HELD = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
"""Where `nn.Module` keeps what its author gave it."""
_TORCH_OWN = set(vars(nn.Module())) - _HELD
"""What it keeps for itself: hooks and flags. All else is its author's."""


@contextmanager
def isolate(
    trainer: Trainer, module: LightningModule, stage: RunningStage = RunningStage.TRAINING, may_log: bool = False
) -> Iterator[FixedModel]:
    """Run forwards of ``module`` without gradients, as in a stage of the Trainer, and leave no trace of them.

    Logging is muted (`self.log`, the Trainer's loggers), the stage reads as ``stage``, and these get back what they
    had: parameters and their gradients, modes, buffers, submodules, hooks, torchmetrics states, other attributes of
    every module (containers one level deep), and the random number generators of Python, NumPy and torch on every
    device, and of the module's own.

    Args:
        trainer: The Trainer.
        module: Its module.
        stage: Training by default: augmentation on the device asks for it.
        may_log: Let `self.log` through, to whoever collects what it is given.

    Yields:
        What to enter for each forward that is to begin with the same parameters, whatever the one before has changed.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_rng_state())
        stack.enter_context(_preserve_own_rng_state(module, getattr(trainer, "datamodule", None)))
        stack.enter_context(_muted(trainer, stage))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        fixed = stack.enter_context(preserve_parameters(module))
        stack.enter_context(_preserve_modules(module, may_log))
        yield fixed


@contextmanager
def _preserve_own_rng_state(module: nn.Module, datamodule: Any) -> Iterator[None]:
    """The same for generators that modules and the data module, or augmentations they hold, have of their own."""
    attributes = [value for m in module.modules() for key, value in vars(m).items() if key not in _TORCH_OWN]
    restore = [snapshot_state(o) for o in find_stateful_objects([*attributes, datamodule]) if isinstance(o, GENERATORS)]
    try:
        yield
    finally:
        for give_back in restore:
            give_back()


@contextmanager
def _muted(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """Loggers that swallow everything, and another stage."""
    kept = trainer.loggers, trainer.state.stage
    try:
        trainer.loggers = [_Muted(logger) for logger in trainer.loggers]
        trainer.state.stage = stage
        yield
    finally:
        trainer.loggers, trainer.state.stage = kept


class _Muted(DummyLogger):
    """Swallows what is logged; a step that asks for the folder or the name of the run gets the true one."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def save_dir(self) -> str | None:
        return self._logger.save_dir

    @property
    def log_dir(self) -> str | None:
        return self._logger.log_dir

    @property
    def name(self) -> str | None:  # type: ignore[override]
        return self._logger.name

    @property
    def version(self) -> int | str | None:  # type: ignore[override]
        return self._logger.version


@contextmanager
def _preserve_modules(module: LightningModule, may_log: bool) -> Iterator[None]:
    kept = {m: (type(m), vars(m).copy(), _hooks_of(m)) for m in module.modules()}
    try:
        for m, (_, own, _) in kept.items():
            vars(m).update({key: _shallow_clone(value) for key, value in own.items() if key not in _TORCH_OWN})
            if is_lightning_module(m) and not may_log:
                vars(m).update(log=_noop, log_dict=_noop)
        yield
    finally:
        for m, (kind, own, hooks) in kept.items():
            if type(m) is not kind:  # a lazy module that was reached for the first time
                m.__class__ = kind
            vars(m).clear()
            vars(m).update(own)
            for held, before in hooks:
                if list(held.items()) != list(before.items()):
                    held.clear()
                    held.update(before)


def _hooks_of(m: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """Each dict of hooks, and what it holds. A module cannot be lent another one: a handle removes from the first."""
    own = ((key, value) for key, value in vars(m).items() if key in _TORCH_OWN)
    return [(value, copy.copy(value)) for _, value in own if isinstance(value, dict)]


def _shallow_clone(value: Any) -> Any:
    """A copy that a forward may change in place: of tensors, and of containers and the tensors right in them."""
    if isinstance(value, dict):
        twin = copy.copy(value)
        twin.update({key: _copied(v) for key, v in value.items()})
        return twin
    if type(value) in (list, deque):
        twin = copy.copy(value)
        for i, v in enumerate(value):
            twin[i] = _copied(v)
        return twin
    return copy.copy(value) if isinstance(value, (list, set, deque)) else _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not is_lazy(value):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _noop(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``self.log`` and ``self.log_dict``."""
