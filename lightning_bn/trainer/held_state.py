"""State that modules and loaders hold in Python objects, at any depth: saved before a pass, restored after it.

Containers and objects are restored in place, so that every reference to them stays valid. Tensors and arrays in them
are replaced by copies in the meantime, and the original objects are put back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import copy
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

_MAX_ITEMS = 1000
"""Longer containers are data: their contents are restored, but not searched."""
_OPAQUE = (str, bytes, int, float, complex, type(None), torch.device, torch.dtype, ModuleType, type, Iterator, Logger)
# Objects of these libraries have threads, files or caches, and a step does not change them.
_LIBRARIES = {"asyncio", "concurrent", "fsspec", "io", "lightning", "lightning_bn", "lightning_fabric", "logging"}
_LIBRARIES |= {"multiprocessing", "pytorch_lightning", "queue", "threading", "torch", "wandb", "_io", "_thread"}
TORCH_ATTRIBUTES = set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
"""Attributes that `nn.Module` keeps for itself, such as hooks. All others are the author's."""


class HeldState:
    """Saves what is reachable from modules and other roots: attributes, contents of containers, generators.

    Args:
        modules: Modules. Tensors in what they hold are replaced by copies; parameters stay.
        others: Other objects, such as samplers. Only a sampler's tensors are copied: a data set's are too large.

    Attributes:
        modules: The modules, and those found in containers and objects.
    """

    def __init__(self, modules: Iterable[nn.Module] = (), others: Iterable[Any] = ()) -> None:
        self.modules = dict.fromkeys(modules)
        self._restores: list[Callable[[], Any]] = []
        self._shared: list[tuple[str, Tensor, int]] = []  # tensors that cannot be replaced, and their versions
        self._seen: dict[int, Any] = {}  # keeps objects alive, so that ids stay unique
        self._copies: dict[int, Any] = {}
        self._of_modules = True
        self._search(list(self.modules))
        self._of_modules = False
        self._search(list(others))

    def restore(self) -> None:
        """Restore everything in place."""
        for restore in self._restores:
            restore()

    def changed(self) -> list[str]:
        """Return the places of tensors that were changed in place and could not be protected."""
        of_modules = {id(p) for m in self.modules for p in m._parameters.values()}
        return [place for place, t, version in self._shared if t._version != version and id(t) not in of_modules]

    def _search(self, roots: Sequence[Any]) -> None:
        found, root_ids = [(type(o).__name__, o) for o in roots], set(map(id, roots))
        while found:
            place, o = found.pop()
            if id(o) not in self._seen and (id(o) in root_ids or self._is_searched(o)):
                self._seen[id(o)] = o
                found += self._save(place, o)

    def _is_searched(self, o: Any) -> bool:
        if isinstance(o, _OPAQUE) or "fit_loop" in getattr(o, "__dict__", ()):  # a Trainer
            return False
        if isinstance(o, (nn.Module, Dataset, DataLoader)):
            return isinstance(o, nn.Module) == self._of_modules  # a loader's state is saved with the loaders
        if isinstance(o, (*GENERATORS, Tensor, FunctionType, MethodType)):
            return True
        library = type(o).__module__
        return library.partition(".")[0] not in _LIBRARIES or library.startswith("torch.utils.data")

    def _save(self, place: str, o: Any) -> list[tuple[str, Any]]:
        # saves one object, and returns what it refers to
        if isinstance(o, GENERATORS):
            self._restores.append(save_generator(o))
        elif isinstance(o, nn.Module):
            self.modules[o] = None
            return self._save_items(place, vars(o), leave=TORCH_ATTRIBUTES)
        elif isinstance(o, (dict, list, deque)):
            return self._save_items(place, o)
        elif isinstance(o, set):
            self._restores.append(partial(_refill, o, o.copy()))
        elif isinstance(o, (tuple, frozenset)):
            return [(f"{place}[{i}]", item) for i, item in enumerate(o)] if len(o) <= _MAX_ITEMS else []
        elif isinstance(o, partial):
            return [(place, part) for part in (o.func, *o.args, *o.keywords.values())]
        elif isinstance(o, FunctionType):
            return [(place, cell.cell_contents) for cell in o.__closure__ or () if cell != CellType()]
        elif isinstance(o, MethodType):
            return [(place, o.__self__)]
        elif isinstance(o, Tensor):
            if not is_lazy(o) and not o.is_inference():
                self._shared.append((place, o, o._version))
        else:
            return self._save_object(place, o)
        return []

    def _save_object(self, place: str, o: Any) -> list[tuple[str, Any]]:
        found = self._save_items(place, vars(o), copies=isinstance(o, Sampler)) if hasattr(o, "__dict__") else []
        for name in _slots_of(o):
            value = getattr(o, name)
            self._restores.append(partial(object.__setattr__, o, name, value))
            if self._of_modules and _is_array(value):
                object.__setattr__(o, name, self._copied(value))
            else:
                found.append((f"{place}.{name}", value))
        return found

    def _save_items(
        self, place: str, o: Any, leave: Collection[str] = (), copies: bool = False
    ) -> list[tuple[str, Any]]:
        self._restores.append(partial(_refill, o, copy(o)))
        if len(o) > _MAX_ITEMS:
            return []
        found = []
        for key, value in list(o.items() if isinstance(o, dict) else enumerate(o)):
            if isinstance(o, dict) and key in leave:
                continue
            if (copies or self._of_modules) and _is_array(value):
                o[key] = self._copied(value)
            else:
                found.append((f"{place}[{key!r}]" if not isinstance(key, str) else f"{place}.{key}", value))
        return found

    def _copied(self, value: Any) -> Any:
        if id(value) not in self._copies:  # once: what refers to one tensor still does during the pass
            self._copies[id(value)] = value.clone() if isinstance(value, Tensor) else value.copy()
        return self._copies[id(value)]


def is_lightning_module(o: Any) -> bool:
    """Recognize modules by their methods: `pytorch_lightning`'s is no instance of `lightning.pytorch`'s."""
    return callable(getattr(o, "training_step", None)) and callable(getattr(o, "log_dict", None))


def _is_array(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and not is_lazy(value)
    return isinstance(value, np.ndarray)


def _slots_of(o: Any) -> list[str]:
    kinds = [vars(kind) for kind in type(o).__mro__ if "__slots__" in vars(kind)]
    members = [name for kind in kinds for name, at in kind.items() if isinstance(at, MemberDescriptorType)]
    return [name for name in members if hasattr(o, name)]


def _refill(o: Any, saved: Any) -> None:
    if isinstance(o, set):
        if o != saved:
            o.clear()
            o.update(saved)
    elif isinstance(o, dict):
        if list(o) != list(saved) or any(o[key] is not value for key, value in saved.items()):
            o.clear()
            for key, value in saved.items():
                o[key] = value
    elif len(o) != len(saved) or any(a is not b for a, b in zip(o, saved, strict=True)):
        o.clear()
        o.extend(saved)
