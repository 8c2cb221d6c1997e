"""Copies of batches, whatever holds their tensors, on their own devices or on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_HOST = torch.device("cpu")


def copied(batch: Any) -> Any:
    """A deep copy of a batch.

    Of each tensor what it shows only: of a part of a large one, ``copy.deepcopy`` would copy all.

    Raises:
        TypeError: If something in it cannot be copied.
    """
    return copied_with(lambda tensor: _clone(tensor, tensor.device), batch)


def copied_with(twin_of: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A deep copy of a batch, with what ``twin_of`` returns in the place of each tensor, wherever that is.

    It is asked once about a tensor that is there twice, and its answer is there twice in the copy.

    Raises:
        TypeError: If something in the batch cannot be copied.
    """
    try:
        with _Copying(twin_of):
            return copy.deepcopy(batch)
    except Exception as error:
        raise TypeError(
            f"Cannot copy a batch of type {type(batch).__name__} ({type(error).__name__}: {error}). Leave out "
            "of it, in the collate function, what copy.deepcopy cannot copy, or give that a __deepcopy__."
        ) from error


def bytes_of(batch: Any) -> int:
    """What the tensors in a batch take, wherever a copy would find them."""
    sizes: list[int] = []

    def weighed(tensor: Tensor) -> Tensor:
        sizes.append(_bytes(tensor))
        return tensor.detach()  # costs nothing, and is no copy

    copied_with(weighed, batch)
    return sum(sizes)


class HostCopy:
    """A copy of a batch whose tensors wait in the host's memory.

    Not all tensors of a batch on a GPU are there (the ``batch_sizes`` of a `PackedSequence` must not be), and objects
    may know on which device their tensors are. So each tensor goes back to where it was.

    Args:
        batch: What to copy.

    Raises:
        TypeError: If something in it cannot be copied.
    """

    def __init__(self, batch: Any) -> None:
        self._devices: dict[int, torch.device] = {}
        self._batch = copied_with(self._to_host, batch)

    def batch(self) -> Any:
        """Another copy, with each tensor where it was."""
        return copied_with(lambda tensor: _clone(tensor, self._devices.get(id(tensor), tensor.device)), self._batch)

    def _to_host(self, tensor: Tensor) -> Tensor:
        twin = _clone(tensor, _HOST)
        self._devices[id(twin)] = tensor.device
        return twin


class _Copying(TorchFunctionMode):
    """Sees every tensor that ``copy.deepcopy`` comes to, however deep in objects, and puts another in its place.

    No object is taken apart and built anew from parts of another type, which one that checks its parts would refuse.

    Args:
        twin_of: The other tensor.
    """

    def __init__(self, twin_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._twin_of = twin_of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copy a tensor in our way; all else as ever."""
        if func is Tensor.clone:  # what subclasses do that have a copy of their own, as torchvision's
            return self._twin_of(args[0])
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            twin = memo[id(tensor)] = self._twin_of(tensor)
            if vars(tensor):
                lost = {name: value for name, value in vars(tensor).items() if name not in vars(twin)}
                with self:  # a mode is off while it answers
                    vars(twin).update(copy.deepcopy(lost, memo))
        return memo[id(tensor)]


def _clone(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device, without the graph that it came from."""
    twin = tensor.detach().to(device, copy=True)
    return twin.requires_grad_() if tensor.requires_grad else twin


def _bytes(tensor: Tensor) -> int:
    if tensor.layout in (torch.strided, torch.jagged):
        return tensor.numel() * tensor.element_size()
    sparse = tensor if tensor.layout == torch.sparse_coo else tensor.to_sparse_coo()
    return sum(part.numel() * part.element_size() for part in (sparse._indices(), sparse._values()))
