"""Isolation: the changes of a forward to module, Trainer and random number generators are undone.

Modules work on copies of their state and get the original objects back, also after an exception.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_bn.core.rng import GENERATORS, preserve_rng_state, save_generator

FixedModel: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Its result is entered for each forward, which then begins with the original parameters."""

_USER_DICTS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_TORCH_ATTRIBUTES = set(vars(nn.Module())) - _USER_DICTS
"""Attributes that `nn.Module` keeps for itself, such as hooks. All others are the author's."""


@contextmanager
def isolate(
    trainer: Trainer, module: LightningModule, stage: RunningStage = RunningStage.TRAINING, may_log: bool = False
) -> Iterator[FixedModel]:
    """Run forwards of ``module`` without gradients, as in a stage of the Trainer, and restore everything.

    That includes parameters, gradients, modes, buffers, submodules, hooks, torchmetrics, other attributes (containers
    one level deep), and random number generators. Loggers are muted, and so is `self.log` unless ``may_log``. The
    Trainer reports ``stage``, because augmentation on the device asks for training.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_rng_state())
        stack.enter_context(_preserve_held_rng_state(module, getattr(trainer, "datamodule", None)))
        stack.enter_context(_muted_loggers(trainer, stage))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        fixed = stack.enter_context(_preserve_parameters(module))
        stack.enter_context(_preserve_modules(module, may_log))
        yield fixed


@contextmanager
def _muted_loggers(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    before = trainer.loggers, trainer.state.stage
    try:
        trainer.loggers = [_MutedLogger(logger) for logger in trainer.loggers]
        trainer.state.stage = stage
        yield
    finally:
        trainer.loggers, trainer.state.stage = before


class _MutedLogger(DummyLogger):
    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    # a step may ask for the folder or the name of the run
    save_dir: Any = property(lambda self: self._logger.save_dir)
    log_dir: Any = property(lambda self: self._logger.log_dir)
    name: Any = property(lambda self: self._logger.name)
    version: Any = property(lambda self: self._logger.version)


@contextmanager
def _preserve_modules(module: LightningModule, may_log: bool) -> Iterator[None]:
    before = {m: (type(m), vars(m).copy(), _hooks_of(m)) for m in module.modules()}
    try:
        for m, (_, attributes, _) in before.items():
            theirs = {key: value for key, value in attributes.items() if key not in _TORCH_ATTRIBUTES}
            vars(m).update({key: _shallow_clone(value) for key, value in theirs.items()})
            if is_lightning_module(m) and not may_log:
                vars(m).update(log=_noop, log_dict=_noop)
        yield
    finally:
        for m, (kind, attributes, hooks) in before.items():
            if type(m) is not kind:  # a lazy module becomes another class at its first call
                m.__class__ = kind
            vars(m).clear()
            vars(m).update(attributes)
            for current, original in hooks:
                if list(current.items()) != list(original.items()):
                    current.clear()
                    current.update(original)


def _hooks_of(m: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    # The dict itself stays in place, because handles remove hooks from it.
    dicts = [value for key, value in vars(m).items() if key in _TORCH_ATTRIBUTES and isinstance(value, dict)]
    return [(hooks, copy.copy(hooks)) for hooks in dicts]


def _shallow_clone(value: Any) -> Any:
    if isinstance(value, dict):
        twin = copy.copy(value)
        twin.update({key: _clone_array(v) for key, v in value.items()})
        return twin
    if type(value) in (list, deque):
        twin = copy.copy(value)
        for i, v in enumerate(value):
            twin[i] = _clone_array(v)
        return twin
    return copy.copy(value) if isinstance(value, (list, set, deque)) else _clone_array(value)


def _clone_array(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not is_lazy(value):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _noop(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _preserve_parameters(module: nn.Module) -> Iterator[FixedModel]:
    # Parameters point to copies of their values, since a momentum encoder's step changes them. Optimizers and DDP hold
    # the objects, and an autograd graph may need the original values. The cost is a second copy of the weights.
    parameters = [*module.parameters(), *filter(is_lazy, module.buffers())]
    before = [(p, type(p), p.data, p.grad, p.requires_grad) for p in parameters]
    try:
        for p in parameters:
            p.grad = None  # a step that computes gradients must not add to those of the training
        yield _ParameterCopies([p for p in parameters if _can_point_to_copy(p)]).fixed
    finally:
        for p, kind, data, gradient, requires_grad in before:
            if type(p) is not kind:  # a lazy parameter becomes another class at the first call
                p.__class__ = kind
            p.data = data
            p.grad = gradient
            if p.requires_grad != requires_grad:
                p.requires_grad = requires_grad


def _can_point_to_copy(p: Tensor) -> bool:
    # wrappers of other tensors cannot; lazy and inference tensors need not
    return not is_lazy(p) and type(p.data) is Tensor and p.layout == torch.strided and not p.is_inference()


class _ParameterCopies:
    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._originals = [p.data for p in parameters]
        self._copies = _clone_all(self._originals)
        self._started = self._ended = 0
        self._restore()
        self._changes = False

    @contextmanager
    def fixed(self) -> Iterator[None]:
        self._started += 1
        if self._started == 2 and not self._ended:  # in lockstep the first forward is suspended
            self._compare()
        self._changes = self._changes or self._versions != self._current_versions()
        if self._changes:
            for twin, original in zip(self._copies, self._originals, strict=True):
                twin.copy_(original)
            self._restore()
        yield
        self._ended += 1
        if self._ended == 1:
            self._compare()

    def _restore(self) -> None:
        for p, twin in zip(self._parameters, self._copies, strict=True):
            p.data = twin
        self._versions = self._current_versions()

    def _current_versions(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self._parameters]

    def _compare(self) -> None:
        # A change in place through `.data` has no new version. Steps change the same each time, so one comparison
        # suffices. It is read once for all parameters of a device, because on a GPU each reading waits.
        differs = defaultdict[torch.device, list[Tensor]](list)
        for original, p in zip(self._originals, self._parameters, strict=True):
            if (original.shape, original.dtype, original.device) != (p.shape, p.dtype, p.device):
                self._changes = True
                return
            differs[p.device].append((_as_integers(original) != _as_integers(p.data)).any())
        self._changes = self._changes or any(bool(torch.stack(flags).any()) for flags in differs.values())


def _as_integers(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _clone_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    # Copies share a storage where the originals do: on a GPU an RNN's weights are parts of one tensor.
    users = Counter(t.untyped_storage()._cdata for t in tensors)
    shared: dict[int, torch.UntypedStorage] = {}
    copies = []
    for t in tensors:
        storage = t.untyped_storage()
        if users[storage._cdata] == 1:
            copies.append(t.clone())  # not the storage, which may be a whole data set's
        else:
            if storage._cdata not in shared:
                shared[storage._cdata] = storage.clone()
            twin = torch.empty(0, dtype=t.dtype, device=t.device)
            copies.append(twin.set_(shared[storage._cdata], t.storage_offset(), t.shape, t.stride()))
    return copies


CONTAINERS = (list, dict, set, deque)
_STATELESS = (Tensor, np.ndarray, ModuleType, Iterator, type)


@contextmanager
def _preserve_held_rng_state(module: nn.Module, datamodule: Any) -> Iterator[None]:
    values = [value for m in module.modules() for key, value in vars(m).items() if key not in _TORCH_ATTRIBUTES]
    objects = find_stateful_objects([*values, datamodule])
    restores = [snapshot_state(o) for o in objects if isinstance(o, GENERATORS)]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def is_lightning_module(o: Any) -> bool:
    """Recognize modules by their methods: `pytorch_lightning`'s is no instance of `lightning.pytorch`'s."""
    return callable(getattr(o, "training_step", None)) and callable(getattr(o, "log_dict", None))


def find_stateful_objects(roots: Sequence[Any], depth: int = 6) -> list[Any]:
    """Find objects with state, generators among them, in attributes, closures and short containers."""
    objects: list[Any] = []
    seen: set[int] = set()
    level = list(roots)
    for _ in range(depth + 1):
        attributes: list[Any] = []
        for o in level:  # which grows in the loop
            o = getattr(o, "__self__", o)
            is_trainer = "fit_loop" in getattr(o, "__dict__", ())
            if o is None or id(o) in seen or isinstance(o, _STATELESS) or is_trainer or is_lightning_module(o):
                continue
            seen.add(id(o))
            if isinstance(o, partial):
                level += (o.func, *o.args, *o.keywords.values())
            elif isinstance(o, FunctionType):
                level += [cell.cell_contents for cell in o.__closure__ or () if cell != CellType()]
            elif isinstance(o, (*CONTAINERS, tuple)):
                level += (list(o.values()) if isinstance(o, dict) else o) if len(o) <= 100 else ()
            elif isinstance(o, GENERATORS) or hasattr(o, "__dict__"):
                objects.append(o)
                attributes += getattr(o, "__dict__", {}).values()
        level = attributes
    return objects


def snapshot_state(o: Any) -> Callable[[], Any]:
    """Return a function that restores the state that an object has now."""
    if isinstance(o, GENERATORS):
        return save_generator(o)
    return partial(vars(o).update, vars(o).copy())
