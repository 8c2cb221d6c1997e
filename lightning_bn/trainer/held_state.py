"""State that modules and loaders hold in Python objects, at any depth: saved before a pass, restored after it.

Containers and objects are restored in place, so that every reference to them stays valid. Tensors and arrays in them
are replaced by copies in the meantime, and the original objects are put back. Only what has changed is written, and by
the methods of Python's own classes: a user's subclass may override them, and other threads may be reading.
"""

from __future__ import annotations

import io
import queue
import socket
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent import futures
from functools import partial
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_bn.core.rng import GENERATORS, save_generator

_MAX_ITEMS, _MAX_OBJECTS = 1000, 50_000
"""Longer containers are data: their contents are restored, but not searched. So is what is found after many objects."""
_EXTERNAL = (io.IOBase, socket.socket, threading.Thread, queue.Queue, futures.Future, futures.Executor)
"""An object that holds one of these is used by others as well, and is left alone."""
_OPAQUE: tuple[type, ...] = (str, bytes, int, float, complex, type(None), torch.device, torch.dtype, ModuleType, type)
_OPAQUE += (Iterator, Logger, *weakref.ProxyTypes, *_EXTERNAL, DataLoader)
# Objects of these libraries have threads, files or caches, and a step does not change them.
_LIBRARIES = {"asyncio", "concurrent", "fsspec", "io", "lightning", "lightning_bn", "lightning_fabric", "logging"}
_LIBRARIES |= {"multiprocessing", "pytorch_lightning", "queue", "threading", "torch", "wandb", "_io", "_thread"}
_SEARCHED = ("torch.utils.data", "lightning.fabric.utilities", "lightning.pytorch.utilities")
TORCH_ATTRIBUTES = set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
"""Attributes that `nn.Module` keeps for itself, such as hooks. All others are the author's."""

_Found = list[tuple[str, Any, bool]]
"""Where an object is, the object, and whether tensors in it are replaced by copies."""


class HeldState:
    """Saves what roots refer to, at any depth: attributes, contents of containers, generators.

    Args:
        copied: Modules and samplers. Tensors in what they hold are replaced by copies; parameters stay.
        others: Other objects. Tensors in them are not copied, because those of a data set are too large. Modules that
            they hold are treated as the others.

    Attributes:
        modules: All modules that were found.
    """

    def __init__(self, copied: Iterable[Any] = (), others: Iterable[Any] = ()) -> None:
        self.modules: dict[nn.Module, None] = {}
        self._restores: list[Callable[[], Any]] = []
        self._shared: list[tuple[str, Tensor, int]] = []  # tensors that cannot be replaced, and their versions
        self._unsaved: list[str] = []
        self._seen: dict[int, Any] = {}  # keeps objects alive, so that ids stay unique
        self._copies: dict[int, Any] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._search([(type(o).__name__, o, True) for o in copied])
        self._search([(type(o).__name__, o, False) for o in others])

    def restore(self) -> list[str]:
        """Restore everything in place; return the places of what could not be saved, restored or protected."""
        parameters = {id(p) for m in self.modules for p in m._parameters.values()}
        changed = [p for p, t, version in self._shared if t._version != version and id(t) not in parameters]
        for restore in self._restores:
            try:
                restore()
            except Exception as error:  # the rest must be restored in any case
                self._unsaved.append(f"{type(error).__name__}: {error}")
        return changed + self._unsaved

    def _search(self, found: _Found) -> None:
        roots = {id(o) for _, o, _ in found}
        while found and len(self._seen) < _MAX_OBJECTS:
            place, o, copies = found.pop()
            if id(o) not in self._seen and (id(o) in roots or self._is_searched(o, copies)):
                self._seen[id(o)] = o
                try:
                    found += self._save(place[:200], o, copies)
                except Exception:  # an object that does not behave as its class must not end a fit
                    self._unsaved.append(place)

    def _is_searched(self, o: Any, copies: bool) -> bool:
        kind = type(o)  # not isinstance, which asks the object
        if issubclass(kind, _OPAQUE) or "fit_loop" in _attributes(o):  # a Trainer
            return False
        if issubclass(kind, nn.Module):  # isolation saves the LightningModule, also if a loader refers to it
            return copies or not is_lightning_module(o)
        if issubclass(kind, (dict, list, deque, set, tuple, frozenset, *GENERATORS, Tensor, FunctionType, MethodType)):
            return True
        library = kind.__module__
        return library.partition(".")[0] not in _LIBRARIES or library.startswith(_SEARCHED)

    def _save(self, place: str, o: Any, copies: bool) -> _Found:
        # saves one object, and returns what it refers to
        kind = type(o)
        if issubclass(kind, GENERATORS):
            self._restores.append(save_generator(o))
        elif issubclass(kind, nn.Module):
            self.modules[o] = None
            return self._save_items(place, vars(o), True, leave=TORCH_ATTRIBUTES)
        elif issubclass(kind, (dict, list, deque)):
            return self._save_items(place, o, copies) + self._save_object(place, o, copies)
        elif issubclass(kind, set):
            self._restores.append(partial(_restore_set, o, set(o)))
        elif issubclass(kind, (tuple, frozenset)):
            return [(f"{place}[{i}]", item, copies) for i, item in enumerate(o)] if len(o) <= _MAX_ITEMS else []
        elif issubclass(kind, partial):
            return [(place, part, copies) for part in (o.func, *o.args, *o.keywords.values())]
        elif issubclass(kind, FunctionType):
            return [(place, c.cell_contents, copies) for c in o.__closure__ or () if c != CellType()]
        elif issubclass(kind, MethodType):
            return [(place, o.__self__, copies)]
        elif issubclass(kind, Tensor):
            if not is_lazy(o) and not o.is_inference():
                self._shared.append((place, o, o._version))
        elif not issubclass(kind, type):
            return self._save_object(place, o, (copies and not issubclass(kind, Dataset)) or issubclass(kind, Sampler))
        return []

    def _save_object(self, place: str, o: Any, copies: bool) -> _Found:
        attributes = _attributes(o)
        if attributes is o or any(issubclass(type(value), _EXTERNAL) for value in attributes.values()):
            return []
        found = self._save_items(place, attributes, copies) if attributes else []
        for name, member in _slots_of(o):
            try:
                value = member.__get__(o, type(o))
            except AttributeError:  # empty
                continue
            self._restores.append(partial(member.__set__, o, value))
            if copies and _is_copied(value):
                member.__set__(o, self._copied(value))
            else:
                found.append((f"{place}.{name}", value, copies))
        return found

    def _save_items(self, place: str, o: Any, copies: bool, leave: Collection[str] = ()) -> _Found:
        kind = _base_of(o)
        items = list(kind.items(o)) if issubclass(kind, dict) else list(enumerate(kind.__iter__(o)))
        self._restores.append(partial(_restore_mapping if issubclass(kind, dict) else _restore_sequence, o, items))
        if len(items) > _MAX_ITEMS:
            return []
        found: _Found = []
        for key, value in items:
            if isinstance(key, str) and key in leave:
                continue
            if copies and _is_copied(value):
                kind.__setitem__(o, key, self._copied(value))
            else:
                found.append((f"{place}.{key}" if type(key) is str else f"{place}[...]", value, copies))
        return found

    def _copied(self, value: Any) -> Any:
        # what refers to one tensor still does during the pass, and so do views of a tensor that was found before
        if id(value) not in self._copies:
            self._copies[id(value)] = self._copy_of(value) if isinstance(value, Tensor) else value.copy()
        return self._copies[id(value)]

    def _copy_of(self, t: Tensor) -> Tensor:
        if type(t) is not Tensor or t.layout != torch.strided:
            return t.clone()
        storage = t.untyped_storage()
        twin = self._storages.get(storage._cdata)
        if twin is None:
            copy = t.clone()
            if storage.nbytes() == t.nbytes and copy.stride() == t.stride():
                self._storages[storage._cdata] = copy.untyped_storage()
            return copy
        view = torch.empty(0, dtype=t.dtype, device=t.device)
        return view.set_(twin, t.storage_offset(), t.shape, t.stride())


def is_lightning_module(o: Any) -> bool:
    """Recognize modules by their methods: `pytorch_lightning`'s is no instance of `lightning.pytorch`'s."""
    return callable(getattr(o, "training_step", None)) and callable(getattr(o, "log_dict", None))


def _is_copied(value: Any) -> bool:
    if issubclass(type(value), Tensor):
        if isinstance(value, nn.Parameter) or is_lazy(value):
            return False
        # an expanded tensor would become large
        return value.layout != torch.strided or 0 not in value.stride() or value.numel() < 2
    return issubclass(type(value), np.ndarray) and value.flags.writeable and not isinstance(value, np.memmap)


def _attributes(o: Any) -> dict[str, Any]:
    try:
        attributes = object.__getattribute__(o, "__dict__")
    except Exception:
        return {}
    return attributes if type(attributes) is dict else {}


def _slots_of(o: Any) -> list[tuple[str, MemberDescriptorType]]:
    kinds = [vars(kind) for kind in type(o).__mro__ if "__slots__" in vars(kind)]
    return [(name, at) for kind in kinds for name, at in kind.items() if isinstance(at, MemberDescriptorType)]


def _base_of(o: Any) -> Any:
    return next(kind for kind in (OrderedDict, dict, list, deque) if issubclass(type(o), kind))


def _restore_mapping(o: Any, saved: list[tuple[Any, Any]]) -> None:
    kind = _base_of(o)
    kept = {id(key) for key, _ in saved}
    for key in [key for key in list(kind.__iter__(o)) if id(key) not in kept]:
        kind.__delitem__(o, key)
    now = [(id(key), id(value)) for key, value in list(kind.items(o))]
    if now == [(id(key), id(value)) for key, value in saved]:
        return
    if [key for key, _ in now] != [id(key) for key, _ in saved]:
        kind.clear(o)  # the order of keys has changed
        now = []
    unchanged = set(now)
    for key, value in saved:
        if (id(key), id(value)) not in unchanged:
            kind.__setitem__(o, key, value)


def _restore_sequence(o: Any, saved: list[tuple[int, Any]]) -> None:
    kind, now = _base_of(o), list(_base_of(o).__iter__(o))
    while kind is deque and len(now) > len(saved):  # an iterator over a deque does not survive clear()
        now.pop()
        deque.pop(o)
    if len(now) != len(saved):
        if kind is list:
            list.__setitem__(o, slice(None), [value for _, value in saved])
        else:
            deque.clear(o)
            deque.extend(o, [value for _, value in saved])
        return
    for (index, value), current in zip(saved, now, strict=True):
        if current is not value:
            kind.__setitem__(o, index, value)


def _restore_set(o: set[Any], saved: set[Any]) -> None:
    if {id(item) for item in set.__iter__(o)} != {id(item) for item in saved}:
        set.intersection_update(o, saved)
        set.update(o, saved)
