"""Copies of batches of any structure, on their own devices or on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_HOST = torch.device("cpu")


def copied(batch: Any) -> Any:
    """Return a deep copy of a batch; unlike ``copy.deepcopy``, it copies only the view of a larger storage."""
    return copied_with(lambda tensor: _clone(tensor, tensor.device), batch)


def copied_with(twin_of: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return a deep copy of a batch in which ``twin_of(tensor)`` replaces each tensor, once per tensor."""
    try:
        with _Copying(twin_of):
            return copy.deepcopy(batch)
    except Exception as error:
        raise TypeError(
            f"Cannot copy a batch of type {type(batch).__name__} ({type(error).__name__}: {error}). Remove what "
            "copy.deepcopy cannot copy from it in the collate function, or give that a __deepcopy__."
        ) from error


def bytes_of(batch: Any) -> int:
    """Return the bytes of all tensors in a batch."""
    sizes: list[int] = []

    def add_size(tensor: Tensor) -> Tensor:
        sizes.append(_bytes(tensor))
        return tensor.detach()  # shares the memory

    copied_with(add_size, batch)
    return sum(sizes)


class HostCopy:
    """Keeps a copy of a batch in the host's memory, and the device of each tensor."""

    def __init__(self, batch: Any) -> None:
        self._devices: dict[int, torch.device] = {}
        self._batch = copied_with(self._to_host, batch)

    def batch(self) -> Any:
        """Return another copy, with each tensor on its original device."""
        return copied_with(lambda tensor: _clone(tensor, self._devices.get(id(tensor), tensor.device)), self._batch)

    def _to_host(self, tensor: Tensor) -> Tensor:
        twin = _clone(tensor, _HOST)
        self._devices[id(twin)] = tensor.device
        return twin


class _Copying(TorchFunctionMode):
    # Replaces tensors inside copy.deepcopy: a class may check the types of its parts, so nothing is rebuilt
    def __init__(self, twin_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._twin_of = twin_of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone:  # called by subclasses that define __deepcopy__, as torchvision's
            return self._twin_of(args[0])
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            twin = memo[id(tensor)] = self._twin_of(tensor)
            if vars(tensor):
                missing = {name: value for name, value in vars(tensor).items() if name not in vars(twin)}
                with self:  # a mode is inactive within its own function
                    vars(twin).update(copy.deepcopy(missing, memo))
        return memo[id(tensor)]


def _clone(tensor: Tensor, device: torch.device) -> Tensor:
    twin = tensor.detach().to(device, copy=True)
    return twin.requires_grad_() if tensor.requires_grad else twin


def _bytes(tensor: Tensor) -> int:
    if tensor.layout in (torch.strided, torch.jagged):
        return tensor.numel() * tensor.element_size()
    sparse = tensor if tensor.layout == torch.sparse_coo else tensor.to_sparse_coo()
    return sum(part.numel() * part.element_size() for part in (sparse._indices(), sparse._values()))
