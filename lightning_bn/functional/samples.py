"""How many samples a batch holds, whatever its structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

Count: TypeAlias = Callable[[Any], int]
"""Samples in a batch."""


def samples_in(batch: Any) -> int:
    """Length of the first tensor found in a batch of nested tuples, lists, mappings and dataclasses.

    Raises:
        ValueError: If there is none.
    """
    for tensor in _tensors(batch):
        return len(tensor) if tensor.ndim else 1
    raise ValueError(
        f"Cannot tell how many samples a batch of type {type(batch).__name__} holds: it has no tensor. Pass count=, "
        "a function from batch to number of samples."
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if is_dataclass(batch) and not isinstance(batch, type):
        batch = vars(batch)
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, Sequence)) and not isinstance(batch, (str, bytes)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
