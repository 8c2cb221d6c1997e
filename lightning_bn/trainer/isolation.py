"""Isolation: the changes of a forward to module, Trainer and random number generators are undone.

Modules work on copies of their state and get the original objects back, also after an exception.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.trainer.states import RunningStage
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_bn.core.rng import preserve_rng_state
from lightning_bn.trainer.held_state import TORCH_ATTRIBUTES, HeldState, is_lightning_module

FixedModel: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Its result is entered for each forward, which then begins with the original parameters."""


@contextmanager
def isolate(
    trainer: Trainer, module: LightningModule, stage: RunningStage = RunningStage.TRAINING, may_log: bool = False
) -> Iterator[FixedModel]:
    """Run forwards of ``module`` without gradients, as in a stage of the Trainer, and restore everything.

    That includes parameters, gradients, modes, buffers, submodules, hooks, torchmetrics, random number generators, and
    what attributes hold at any depth. Loggers are muted, and so is `self.log` unless ``may_log``. The Trainer reports
    ``stage``, because augmentation on the device asks for training.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_rng_state())
        stack.enter_context(_muted_loggers(trainer, stage))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        modules = stack.enter_context(_preserve_modules(trainer, module, may_log))
        yield stack.enter_context(_preserve_parameters(modules))


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
def _preserve_modules(trainer: Trainer, module: LightningModule, may_log: bool) -> Iterator[Iterable[nn.Module]]:
    rates = [*(o.param_groups for o in trainer.optimizers), *(c.scheduler for c in trainer.lr_scheduler_configs)]
    before = HeldState(module.modules(), [getattr(trainer, "datamodule", None), *rates])
    kinds = {m: (type(m), _hooks_of(m)) for m in before.modules}
    try:
        for m in before.modules:
            if is_lightning_module(m) and not may_log:
                vars(m).update(log=_noop, log_dict=_noop)
        yield before.modules
    finally:
        _warn_of(before.restore(), module)
        for m, (kind, hooks) in kinds.items():
            if type(m) is not kind:  # a lazy module becomes another class at its first call
                m.__class__ = kind
            for current, original in hooks:
                if list(current.items()) != list(original.items()):
                    current.clear()
                    current.update(original)


def _hooks_of(m: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    # The dict itself stays in place, because handles remove hooks from it.
    dicts = [value for key, value in vars(m).items() if key in TORCH_ATTRIBUTES and isinstance(value, dict)]
    return [(hooks, copy.copy(hooks)) for hooks in dicts]


_WARNED: WeakSet[nn.Module] = WeakSet()


def _warn_of(places: Sequence[str], module: nn.Module) -> None:
    if places and module not in _WARNED:
        _WARNED.add(module)
        rank_zero_warn(
            f"A pass may have changed what it cannot restore: {', '.join(places[:5])}. Hold tensors in a list, a dict "
            "or an attribute instead of a tuple, or replace them instead of changing them in place."
        )


def _noop(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _preserve_parameters(modules: Iterable[nn.Module]) -> Iterator[FixedModel]:
    # Parameters point to copies of their values, since a momentum encoder's step changes them. Optimizers and DDP hold
    # the objects, and an autograd graph may need the original values. The cost is a second copy of the weights.
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    parameters = list(dict.fromkeys(t for t in tensors if isinstance(t, nn.Parameter) or is_lazy(t)))
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
