"""Pytrees of tensors that all have the same number of rows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, device, dtype
from torch.utils import _pytree as pytree

_PLAIN = (type(None), bool, int, float, complex, str, dtype, device)  # may accompany the tensors and are not exchanged


class RowStructure(NamedTuple):
    """Holds a flattened structure of tensors of rows."""

    tensors: list[Tensor]
    places: list[str]
    leaves: list[Any]
    spec: pytree.TreeSpec
    rows: int

    @classmethod
    def of(cls, value: Any, source: str, rows: int | None = None) -> RowStructure:
        """Flatten a structure whose tensors have ``rows`` rows, if that is known; ``source`` starts error messages."""
        leaves, spec = pytree.tree_flatten(value)
        tensors = [leaf for leaf in leaves if _has_rows(leaf)]
        places = [place for place, leaf in zip(_places(value, len(leaves)), leaves, strict=True) if _has_rows(leaf)]
        unknown = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
        if rows is not None:  # a 0-dimensional output is a sum over rows of other ranks
            unknown += [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.ndim]
        if unknown or not tensors:
            what = "no tensor" if not unknown else f"a {type(unknown[0]).__name__} that is no tensor of rows"
            raise TypeError(f"{source} {what}: only tensors whose first dimension is rows can change ranks.")
        sizes = sorted({len(t) for t in tensors} | ({rows} if rows is not None else set()))
        if len(sizes) > 1:
            raise ValueError(f"{source} tensors of different numbers of rows: {', '.join(map(str, sizes))}.")
        _check_hidden_rows(value, sizes[0], source)
        return cls(tensors, places, leaves, spec, sizes[0])

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """Return the structure with other tensors of rows."""
        new = iter(tensors)
        return pytree.tree_unflatten([next(new) if _has_rows(leaf) else leaf for leaf in self.leaves], self.spec)

    @property
    def layout(self) -> int:
        """Return a checksum of everything that must be equal on all ranks."""
        return zlib.crc32(", ".join(self.describe()).encode())

    def describe(self) -> list[str]:
        """List place, dtype and shape of each tensor."""
        shapes = [f"{t.dtype} (rows, {', '.join(map(str, t.shape[1:]))})" for t in self.tensors]
        return [f"{place} {shape}".strip() for place, shape in zip(self.places, shapes, strict=True)]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _places(value: Any, leaves: int) -> list[str]:
    try:
        return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
    except ValueError:  # a registered container without key paths
        return [f"[{number}]" for number in range(leaves)]


def _check_hidden_rows(value: Any, rows: int, source: str) -> None:
    # a list with one plain value per row would stay while rows change ranks
    def hides_rows(part: Any) -> bool:
        if type(part) not in (list, tuple) or len(part) != rows or rows < 2:
            return False
        leaves = pytree.tree_leaves(part)
        if type(part) is tuple and rows == 2 and all(isinstance(leaf, (int, float)) for leaf in leaves):
            return False  # a size
        has_values = any(isinstance(leaf, (int, float, complex, str, Tensor)) for leaf in leaves)
        return has_values and not any(_has_rows(leaf) for leaf in leaves)

    for part in pytree.tree_leaves(value, is_leaf=hides_rows):
        if hides_rows(part):
            raise TypeError(
                f"{source} a {type(part).__name__} of {rows} things that are no tensors of rows, and {rows} rows: "
                "only tensors whose first dimension is rows can change ranks. Make it a tensor, or leave it out."
            )
