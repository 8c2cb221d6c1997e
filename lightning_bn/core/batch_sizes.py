"""Number of samples in a batch of any structure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Number, Real
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bn.core.checks import NoStopIteration

T = TypeVar("T")
BatchSizeFn: TypeAlias = Callable[[Any], int]
"""Returns the number of samples in a batch."""
_ARRAYS = (Tensor, np.ndarray)
_CHANNELS = {1, 3, 4}  # of images: gray, color, and color with transparency or depth


def as_batch_size_fn(batch_size_fn: BatchSizeFn | None) -> BatchSizeFn:
    """Return the user's function with a check of its results, or `infer_batch_size`."""
    if batch_size_fn is None:
        return infer_batch_size
    if not callable(batch_size_fn):
        raise TypeError(
            f"batch_size_fn must be a function from a batch to its number of samples but is {batch_size_fn!r}."
        )
    return Checked(batch_size_fn)


@dataclass(frozen=True)
class Checked:
    """Calls the user's function and validates its result; picklable if the function is."""

    batch_size_fn: BatchSizeFn

    def __call__(self, batch: Any) -> int:
        result = call_on_batch("batch_size_fn", self.batch_size_fn, batch)
        number = result.item() if isinstance(result, Tensor) and result.numel() == 1 else result
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(
                f"batch_size_fn must return a batch's number of samples but returned {result!r} for {described(batch)}."
            )
        if not math.isfinite(number) or number < 0 or number != int(number):
            raise ValueError(
                f"batch_size_fn must return a batch's number of samples but returned {result!r} for {described(batch)}."
            )
        return int(number)


def call_on_batch(name: str, function: Callable[[Any], T], batch: Any) -> T:
    """Call the user's function ``name`` on a batch; the error of a failed lookup describes the batch."""
    try:
        with NoStopIteration(name):
            return function(batch)
    except (LookupError, AttributeError) as error:  # usually the wrong key
        raise ValueError(f"{name} fails on {described(batch)}: {type(error).__name__}: {error}") from error


def infer_batch_size(batch: Any) -> int:
    """Infer the number of samples in a batch.

    =============================================================  ===================================================
    part of a batch                                                samples
    =============================================================  ===================================================
    tensor, NumPy array                                            its first size; none for a scalar
    packed sequence; object with ``num_graphs``                    its sequences; its graphs
    mapping, dataclass, named tuple; list of different things      those of its first part
    list of images (C, H, W) with 1, 3 or 4 channels               its length
    list of mappings, dataclasses, (tensor, label) pairs, scalars  its length
    list of tensors with 4 and more dimensions: views of a batch   those of the first of them
    list of other tensors, which is the batch                      those of the first of them
    list of strings; list of objects within a batch                its length, if there is nothing of the above
    list of other tensors within a batch                           nothing
    =============================================================  ===================================================

    A tuple is a list. Images in a list are views of a batch if another part is as long as they are, and no part is as
    long as the list. A batch that is a list of mappings or pairs holds different things if they share no key (inputs,
    targets), or if each looks like a batch (two tensors of equal length). A list of mappings within a batch does so if
    each has a tensor of 4 or more dimensions.

    The kind of each part decides, not its size, so a smaller last batch is read the same way. The exception: lone
    tensors of 3 dimensions and first size 1, 3 or 4 are images.
    """
    if isinstance(batch, Tensor) and batch.ndim:
        return batch.size(0)
    # Lightning's extract_batch_size takes the first size of the first tensor: 3 for a list of RGB images. It also uses
    # up iterators, and counts the rows of packed sequences and the nodes of graphs.
    parts = list(_parts(batch, outermost=True))
    for part in parts:
        if part.certain:
            others = {n for other in parts if other is not part for n in other.readings}
            return next((n for n in part.readings if n in others), part.readings[0])
    lengths = [part.readings[0] for part in parts if len(part.readings) == 1]
    if any(lengths) or (lengths and len(lengths) == len(parts)):
        return next(filter(None, lengths), 0)
    reason = "a list of tensors in it may hold a sample or a batch in each" if parts else "no part of it has a size"
    raise ValueError(
        f"Cannot infer the number of samples in a batch that is {described(batch)}: {reason}. Pass batch_size_fn=, a "
        "function from a batch to its number of samples, such as batch_size_fn=lambda batch: len(batch[0])."
    )


class _Part(NamedTuple):
    readings: Sequence[int]  # possible numbers of samples, the likeliest first
    certain: bool  # the first such part decides; others count only if there is none


def _parts(batch: Any, outermost: bool = False) -> Iterator[_Part]:
    size = _size(batch)
    if size is not None:
        yield _Part([size], certain=True)
    elif _is_record(batch):
        for value in _values(batch):
            yield from _parts(value)
    elif _is_list(batch):
        yield from _parts_of_list(batch, outermost)


def _parts_of_list(batch: Sequence[Any], outermost: bool) -> Iterator[_Part]:
    if not batch or all(isinstance(item, (str, bytes)) for item in batch):
        yield _Part([len(batch)], certain=False)
    elif all(isinstance(item, _ARRAYS) for item in batch):
        yield from _parts_of_arrays(batch, outermost)
    elif all(_is_record(item) or _is_mixed(item) for item in batch):
        different = outermost and not set.intersection(*map(_names, batch))
        if different or all(_looks_like_a_batch(item, outermost) for item in batch):
            yield from itertools.chain.from_iterable(map(_parts, batch))
        else:
            yield _Part([len(batch)], certain=True)
    elif not outermost and all(_is_opaque(item) for item in batch):
        yield _Part([len(batch)], certain=False)
    else:
        for item in batch:
            yield from _parts(item)


def _parts_of_arrays(arrays: Sequence[Any], outermost: bool) -> Iterator[_Part]:
    ranks, sizes = {array.ndim for array in arrays}, [_size(array) for array in arrays]
    firsts = [size for size in sizes if size is not None]
    if ranks == {0}:
        yield _Part([len(arrays)], certain=True)
    elif ranks == {3} and _CHANNELS.issuperset(firsts):
        yield _Part([len(arrays), firsts[0]], certain=True)
    elif outermost or len(ranks) > 1 or min(ranks) > 3:
        yield from (_Part([size], certain=True) for size in firsts)
    else:
        yield _Part([len(arrays), firsts[0]], certain=False)


def _size(part: Any) -> int | None:
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    if isinstance(part, _ARRAYS):
        first = part.size(0) if isinstance(part, Tensor) and part.ndim else None  # a nested tensor has no shape
        return int(part.shape[0]) if isinstance(part, np.ndarray) and part.ndim else first
    graphs = getattr(part, "num_graphs", None)
    return graphs if isinstance(graphs, int) else None


def _looks_like_a_batch(record: Any, outermost: bool) -> bool:
    # a tensor that no sample has decides; boxes and labels of one image also have equal lengths
    arrays = [value for value in _values(record) if isinstance(value, _ARRAYS) and value.ndim]
    alike = outermost and len(arrays) > 1 and len({_size(array) for array in arrays}) == 1
    return alike or any(array.ndim > 3 for array in arrays)


def _values(record: Any) -> Iterable[Any]:
    if is_dataclass(record):
        return (getattr(record, field.name, None) for field in fields(record))
    values: Iterable[Any] = record.values() if isinstance(record, Mapping) else record
    return values


def _names(record: Any) -> set[Any]:
    if is_dataclass(record):
        return {field.name for field in fields(record)}
    return set(record) if isinstance(record, Mapping) else set(getattr(record, "_fields", range(len(record))))


def _is_record(part: Any) -> bool:
    named_tuple = isinstance(part, tuple) and hasattr(part, "_fields") and not isinstance(part, PackedSequence)
    return named_tuple or isinstance(part, Mapping) or (is_dataclass(part) and not isinstance(part, type))


def _is_list(part: Any) -> bool:
    return isinstance(part, Sequence) and not isinstance(part, (str, bytes, PackedSequence)) and not _is_record(part)


def _is_mixed(part: Any) -> bool:
    return _is_list(part) and any(isinstance(p, _ARRAYS) for p in part) and len({_kind(p) for p in part}) > 1


def _kind(part: Any) -> tuple[type, int]:
    return (Tensor, part.ndim) if isinstance(part, _ARRAYS) else (type(part), 0)


def _is_opaque(part: Any) -> bool:
    known = isinstance(part, (*_ARRAYS, str, bytes, Number, PackedSequence)) or _is_record(part) or _is_list(part)
    return not known and _size(part) is None


def described(part: Any, depth: int = 3) -> str:
    """Describe a batch for an error, such as ``a tuple of (a list of 2 x a tensor (13, 5, 5), an int)``."""
    name = type(part).__name__
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    if isinstance(part, _ARRAYS):
        sizes = "of uneven sizes" if isinstance(part, Tensor) and part.is_nested else tuple(part.shape)
        return f"{article} {name} {sizes}"
    if not depth or not (_is_record(part) or _is_list(part)):
        return f"{article} {name}"
    items = [described(value, depth - 1) for value in itertools.islice(_values(part), 8)]
    many = len(items) > 1 and len(set(items)) == 1 and not _is_record(part)
    return f"{article} {name} of " + (f"{len(part)} x {items[0]}" if many else f"({', '.join(items)})")
