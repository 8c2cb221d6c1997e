"""What loaders and modules own besides tensors: objects with state, random number generators among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from lightning_bn.core.rng import GENERATORS, save_generator


def is_lightning_module(o: Any) -> bool:
    """By its methods: `pytorch_lightning`'s is no instance of `lightning.pytorch`'s."""
    return callable(getattr(o, "training_step", None)) and callable(getattr(o, "log_dict", None))


def find_stateful_objects(roots: Sequence[Any], depth: int = 6) -> list[Any]:
    """Objects with state of their own, from ``roots`` down a few attributes and through short containers."""
    found: list[Any] = []
    seen: set[int] = set()
    layer = list(roots)
    for _ in range(depth + 1):
        following: list[Any] = []
        for o in layer:
            o = getattr(o, "__self__", o)
            if o is None or id(o) in seen or isinstance(o, _NOT_OURS) or is_lightning_module(o):
                continue
            seen.add(id(o))
            if isinstance(o, partial):
                layer += (o.func, *o.args, *o.keywords.values())  # still being read
                continue
            if isinstance(o, FunctionType):
                layer += [cell.cell_contents for cell in o.__closure__ or () if cell != CellType()]
                continue
            if "fit_loop" in getattr(o, "__dict__", ()):
                continue  # a Trainer, of whichever package
            if isinstance(o, (*CONTAINERS, tuple)):
                layer += (list(o.values()) if isinstance(o, dict) else o) if len(o) <= 100 else ()
            elif isinstance(o, GENERATORS) or hasattr(o, "__dict__"):
                found.append(o)
                following += vars(o).values() if hasattr(o, "__dict__") else ()
        layer = following
    return found


CONTAINERS = (list, dict, set, deque)
_NOT_OURS = (Tensor, np.ndarray, ModuleType, Iterator, type)


def snapshot_state(o: Any) -> Callable[[], Any]:
    """A function that puts an object back into the state it has now."""
    if isinstance(o, GENERATORS):
        return save_generator(o)
    return partial(vars(o).update, vars(o).copy())
