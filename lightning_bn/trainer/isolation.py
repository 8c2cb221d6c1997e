"""Isolation: what a forward changes in module, Trainer and random number generators is restored afterwards.

Modules work on copies of their state and get the original objects back. So nothing has to be searched for changes or
copied back, and an exception leaves nothing half restored.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
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

FixedModel: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Enter its result for each forward: every forward then begins with the same parameters."""

_USER_DICTS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_TORCH_ATTRIBUTES = set(vars(nn.Module())) - _USER_DICTS
"""Attributes that `nn.Module` keeps for itself, such as hooks. All others are the author's."""


@contextmanager
def isolate(
    trainer: Trainer, module: LightningModule, stage: RunningStage = RunningStage.TRAINING, may_log: bool = False
) -> Iterator[FixedModel]:
    """Run forwards of ``module`` without gradients, as in a stage of the Trainer, and restore everything.

    Restored are parameters and their gradients, modes, buffers, submodules, hooks, torchmetrics states, other
    attributes of every module (containers one level deep), and random number generators: Python's, NumPy's, torch's on
    every device, and those that module and data module hold. Loggers are muted, and so is `self.log` unless
    ``may_log``. The Trainer reports ``stage``: augmentation on the device asks for training.
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
    """Discards what is logged. A step that asks for the folder or the name of the run gets the true one."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

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
    """Each dict of hooks with a copy. The dict itself stays in place, because handles remove hooks from it."""
    dicts = [value for key, value in vars(m).items() if key in _TORCH_ATTRIBUTES and isinstance(value, dict)]
    return [(hooks, copy.copy(hooks)) for hooks in dicts]


def _shallow_clone(value: Any) -> Any:
    """A copy that a forward may change in place: of tensors, and of containers and the tensors directly in them."""
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
    """Point parameters to copies of their values meanwhile: a momentum encoder's step changes them, for instance."""
    # The objects stay the same, since optimizers and DDP hold them. The original values are not written to, since an
    # autograd graph may need them. The price is a second copy of the weights during a pass.
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
    """False for wrappers of other tensors, which cannot, and for lazy and inference tensors, which need not."""
    return not is_lazy(p) and type(p.data) is Tensor and p.layout == torch.strided and not p.is_inference()


class _ParameterCopies:
    """Points parameters to copies, and restores these before each forward once a forward has changed one."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._originals = [p.data for p in parameters]
        self._copies = _clone_all(self._originals)
        self._started = self._ended = 0
        self._restore()
        self._changes = False

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Run a forward that begins with the original values."""
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
        # A change in place through `.data` has no new version. Steps change the same every time, so one look suffices:
        # on a GPU each look waits.
        pairs = zip(self._originals, self._parameters, strict=True)
        self._changes = self._changes or not all(_same_bits(original, p.data) for original, p in pairs)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _clone_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that share a storage where the originals do: on a GPU an RNN's weights are parts of one tensor."""
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
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_STATELESS = (Tensor, np.ndarray, ModuleType, Iterator, type)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the global random number generators on leaving."""
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)


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
    """Recognizes modules by their methods: `pytorch_lightning`'s is no instance of `lightning.pytorch`'s."""
    return callable(getattr(o, "training_step", None)) and callable(getattr(o, "log_dict", None))


def find_stateful_objects(roots: Sequence[Any], depth: int = 6) -> list[Any]:
    """Objects with state, generators among them, from ``roots`` down some attributes and through short containers."""
    found: list[Any] = []
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
                found.append(o)
                attributes += getattr(o, "__dict__", {}).values()
        level = attributes
    return found


def snapshot_state(o: Any) -> Callable[[], Any]:
    """A function that restores the state that an object has now."""
    if isinstance(o, (torch.Generator, np.random.RandomState)):
        return partial(o.set_state, o.get_state())
    if isinstance(o, random.Random):
        return partial(o.setstate, o.getstate())
    if isinstance(o, np.random.Generator):
        return partial(setattr, o.bit_generator, "state", o.bit_generator.state)
    return partial(vars(o).update, vars(o).copy())
