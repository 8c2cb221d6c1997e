"""How many samples a batch holds, whatever its structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

Count: TypeAlias = Callable[[Any], int]
"""Samples in a batch."""


def counted_by(count: Count | None) -> Count:
    """The function that ``count=`` asks for: the user's, whose answers are checked, or `samples_in`.

    Raises:
        TypeError: If it is no function.
    """
    if count is None:
        return samples_in
    if not callable(count):
        raise TypeError(f"count must be a function from a batch to its number of samples but is {count!r}.")
    return Checked(count)


@dataclass(frozen=True)
class Checked:
    """The user's function, and what it says if that is a number of samples; pickles where the function does.

    Raises:
        TypeError: If it says something that is no number.
        ValueError: If what it says is no number of samples.
        RuntimeError: If it raises StopIteration, which would end a loop over batches without a word.
    """

    count: Count

    def __call__(self, batch: Any) -> int:
        try:
            said = self.count(batch)
        except StopIteration as error:
            raise RuntimeError("count raised StopIteration.") from error
        number = said.item() if isinstance(said, Tensor) and said.numel() == 1 else said
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"count must return a batch's number of samples but returned {said!r}.")
        if not math.isfinite(number) or number < 0 or number != int(number):
            raise ValueError(f"count must return a batch's number of samples but returned {said!r}.")
        return int(number)


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
