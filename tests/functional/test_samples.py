"""Samples are counted as people count them, and what a user's ``count`` says is checked in one place."""

from __future__ import annotations

import re
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate

from lightning_bn.core.batch_sizes import as_batch_size_fn, infer_batch_size

Pair = namedtuple("Pair", "x y")


@dataclass
class Plain:
    x: Any
    y: Any = None


@dataclass(slots=True)
class Slots:
    x: Any
    y: Any = None


@dataclass
class Validating:
    x: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor")
        super().__setattr__(name, value)


class Graphs:
    """As torch-geometric's ``Batch``: more nodes than graphs."""

    def __init__(self, num_graphs: int) -> None:
        self.x, self.num_graphs = torch.zeros(5 * num_graphs + 1, 2), num_graphs


class Opaque:
    """As mmdet's ``DetDataSample``."""


def images(n: int, channels: int = 3) -> list[Tensor]:
    """Of different sizes."""
    return [torch.zeros(channels, 5 + i % 3, 6) for i in range(n)]


def boxes(n: int, each: int = 4) -> list[dict[str, Tensor]]:
    return [{"boxes": torch.zeros(each, 4), "labels": torch.zeros(each)} for _ in range(n)]


def labels(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def stacked(n: int, *size: int) -> Tensor:
    return torch.zeros(n, *(size or (3, 6, 6)))


def packed(n: int) -> Any:
    return pack_sequence([torch.zeros(3, 2)] + [torch.zeros(1, 2)] * (n - 1))


COLLATED: dict[str, Callable[[int], Any]] = {
    "tensor": stacked,
    "array": lambda n: np.zeros((n, 3)),
    "(x, y)": lambda n: (stacked(n), labels(n)),
    "(x, y), both with features": lambda n: (stacked(n, 8), stacked(n, 1)),
    "two views": lambda n: [stacked(n), stacked(n)],
    "two views and labels": lambda n: [[stacked(n), stacked(n)], labels(n)],
    "two sequences as views": lambda n: ([stacked(n, 9, 2), stacked(n, 9, 2)], labels(n)),
    "crops of two sizes": lambda n: ([stacked(n, 3, 8, 8)] * 2 + [stacked(n)] * 6, labels(n), ["name"] * n),
    "dict": lambda n: {"pixel_values": stacked(n), "labels": labels(n), "size": (640, 480)},
    "dict of dicts": lambda n: {"inputs": {"ids": stacked(n, 7)}, "labels": labels(n)},
    "UserDict": lambda n: UserDict(input_ids=stacked(n, 9), labels=labels(n)),
    "named tuple": lambda n: Pair(stacked(n), labels(n)),
    "dataclass": lambda n: Plain(stacked(n), labels(n)),
    "dataclass with slots": lambda n: Slots(stacked(n), labels(n)),
    "dataclass that validates": lambda n: Validating(stacked(n)),
    "scalars before the data": lambda n: {"scale": torch.tensor(0.5), "mode": "train", "x": stacked(n)},
    "weights after the data": lambda n: (stacked(n), labels(n), torch.zeros(7)),
    "boxes of all images in one tensor": lambda n: (stacked(n), torch.zeros(11, 6)),
    "texts and labels": lambda n: (["text"] * n, labels(n)),
    "texts": lambda n: ["text"] * n,
    "two loaders": lambda n: {"a": [stacked(n), labels(n)], "b": [stacked(n + 3), labels(n + 3)]},
    "two loaders in a list": lambda n: [[stacked(n), labels(n)], [stacked(n + 3), labels(n + 3)]],
    "two loaders of dicts": lambda n: [{"x": stacked(n, 8), "y": labels(n)}, {"x": stacked(2, 8), "y": labels(2)}],
    "two loaders of images": lambda n: [{"x": stacked(n)}, {"x": stacked(n + 3)}],
    "inputs and targets": lambda n: [{"x": stacked(n, 8)}, {"y": labels(n)}],
    "inputs and targets as dataclasses": lambda n: (Pair(stacked(n, 8), None), Slots(labels(n)), Graphs(n)),
    "batches in a tuple": lambda n: {"meta": ["a", None], "data": (Plain("b", stacked(n)), Plain("c", stacked(n)))},
    "loader of one tensor": lambda n: [stacked(n, 9)],
    "graphs": Graphs,
    "graphs and labels": lambda n: (Graphs(n), labels(n)),
    "pair of graphs": lambda n: (Graphs(n), Graphs(n)),
}
"""Kind of batch -> one of n samples that were put together."""
LISTED: dict[str, Callable[[int], Any]] = {
    "images": images,
    "gray images": lambda n: images(n, 1),
    "images and targets": lambda n: (images(n), boxes(n)),
    "images and as many boxes as channels": lambda n: (images(n), boxes(n, 3)),
    "tuples, as torchvision collates": lambda n: (tuple(images(n)), tuple(boxes(n))),
    "images of 13 bands and targets": lambda n: [images(n, 13), boxes(n)],
    "images of 13 bands and labels": lambda n: (images(n, 13), labels(n)),
    "images and labels": lambda n: (images(n), labels(n)),
    "images and labels in a list": lambda n: (images(n, 5), list(labels(n))),
    "images and masks": lambda n: (images(n), [image[0] for image in images(n)]),
    "images and boxes in one tensor": lambda n: (images(n), torch.zeros(2 * n, 6)),
    "images and names": lambda n: {"names": ["name"] * n, "images": images(n, 2)},
    "videos and targets": lambda n: (boxes(n), [torch.zeros(3, 8, 6, 6)] * n),
    "equal point clouds and targets": lambda n: ([torch.zeros(100, 3)] * n, boxes(n)),
    "dicts": lambda n: [{"image": image, "height": 6, "id": i} for i, image in enumerate(images(n))],
    "dicts with targets": lambda n: [{"image": image, "boxes": torch.zeros(2, 4)} for image in images(n)],
    "dict of lists": lambda n: {"inputs": images(n), "data_samples": [Opaque()] * n},
    "dict of lists, other channels": lambda n: {"inputs": images(n, 13), "data_samples": [None] * n},
    "pairs as the dataset gives them": lambda n: [(image, 5) for image in images(n)],
    "dataclasses": lambda n: [Plain(image, 1) for image in images(n)],
    "dataclass of lists": lambda n: Slots(images(n), boxes(n)),
}
"""Kind of batch -> one of n samples that stand in lists."""
REFUSED: dict[str, tuple[Any, str]] = {
    "object": (Opaque(), "a batch that is an Opaque: no part of it has a size"),
    "two objects": ((Opaque(), Opaque()), "a tuple of 2 x an Opaque"),
    "scalar": (torch.tensor(1.0), "a Tensor ()"),
    "nothing": (None, "a NoneType"),
    "numbers": ([1, 2], "a list of 2 x an int"),
    "sequences, each of its own length": (
        ([torch.zeros(9), torch.zeros(7)], [torch.zeros(3), torch.zeros(2)]),
        "a tuple of (a list of (a Tensor (9,), a Tensor (7,)), a list of (a Tensor (3,), a Tensor (2,))): a list",
    ),
    "images of 13 bands and masks": (
        {"x": images(2, 13), "masks": [torch.zeros(5, 6)] * 2},
        "a dict of (a list of (a Tensor (13, 5, 6), a Tensor (13, 6, 6)), a list of 2 x a Tensor (5, 6))",
    ),
}


def kinds(*tables: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for t in tables for name, kind in t.items()])


@kinds(COLLATED, LISTED)
@pytest.mark.parametrize("n", [5, 2, 1, 3])
def test_samples_are_counted_whatever_holds_them(kind: Callable[[int], Any], n: int) -> None:
    assert infer_batch_size(kind(n)) == n


@kinds(COLLATED, LISTED)
def test_an_empty_batch_holds_no_samples(kind: Callable[[int], Any]) -> None:
    assert infer_batch_size(kind(0)) == 0


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("beside", [lambda n: (packed(n), labels(n)), packed, lambda n: {"x": packed(n)}])
def test_packed_sequences_are_counted(beside: Callable[[int], Any], n: int) -> None:
    assert infer_batch_size(beside(n)) == n


@kinds(REFUSED)
def test_what_cannot_be_counted_is_refused_by_type_and_structure(kind: tuple[Any, str]) -> None:
    batch, said = kind
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        infer_batch_size(batch)
    assert refusal.match(r"Pass batch_size_fn=.* such as batch_size_fn=lambda batch: len\(batch\[0\]\)")


samples_of_a_dataset = st.recursive(
    st.integers(1, 4).flatmap(lambda dims: st.just((2, 5, 6, 7)[:dims])),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(tuple) | st.dictionaries(st.text("ab"), inner, min_size=1)
    ),
    max_leaves=5,
)


@given(samples_of_a_dataset, st.integers(5, 9))
def test_what_torch_collates_is_counted_as_lightning_does(sample: Any, n: int) -> None:
    """Unless it may as well be a list of samples: of views or mappings of one tensor each, and nothing beside it."""

    def made(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: made(value) for key, value in part.items()}
        sizes = all(isinstance(p, int) for p in part)
        return torch.zeros(part) if sizes else tuple(made(p) for p in part)

    alike = isinstance(sample, tuple) and all(isinstance(part, dict) for part in sample)
    assume(not alike or not set.intersection(*map(set, sample)))
    batch = default_collate([made(sample)] * n)
    try:
        assert infer_batch_size(batch) == extract_batch_size(batch) == n
    except ValueError as refusal:
        assert "may hold a sample or a batch" in str(refusal)


@pytest.mark.parametrize(("n", "counted"), [(16, 16), (5, 5), (2, 2), (0, 0), (1, 2), (3, 2), (4, 2)])
def test_sequences_alone_are_images_where_they_look_like_images(n: int, counted: int) -> None:
    assert infer_batch_size([stacked(n, 7, 2), stacked(n, 5, 2)]) == counted


@given(st.lists(st.sampled_from([1, 3, 4]), min_size=1, max_size=6), st.booleans())
def test_a_list_of_images_is_as_long_as_it_is(channels: list[int], targets: bool) -> None:
    batch = [torch.zeros(c, 6, 7) for c in channels]
    assert infer_batch_size((batch, boxes(len(batch))) if targets else batch) == len(batch)


# ---------------------------------------------------------------------------------------------------- a user's count
@pytest.mark.parametrize("said", [4, 4.0, np.int64(4), torch.tensor(4)])
def test_whole_numbers_of_any_type_are_counts(said: Any) -> None:
    assert as_batch_size_fn(lambda _: said)(None) == 4
    assert as_batch_size_fn(None) is infer_batch_size


@pytest.mark.parametrize("said", [-1, float("nan"), float("inf"), 2.5, torch.tensor(-1)])
def test_what_is_no_number_of_samples_is_refused(said: Any) -> None:
    with pytest.raises(
        ValueError, match=r"batch_size_fn must return .* but returned (-1|nan|inf|2\.5|tensor).* for a NoneType"
    ):
        as_batch_size_fn(lambda _: said)(None)


@pytest.mark.parametrize("said", [None, "4", True, torch.zeros(2)])
def test_what_is_no_number_is_refused(said: Any) -> None:
    with pytest.raises(TypeError, match=r"batch_size_fn must return .* for a list of 2 x a Tensor \(3,\)"):
        as_batch_size_fn(lambda _: said)([torch.zeros(3)] * 2)


def test_what_is_no_function_and_a_stop_iteration_are_refused() -> None:
    with pytest.raises(TypeError, match=r"batch_size_fn must be a function .* but is 5"):
        as_batch_size_fn(5)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="batch_size_fn raised StopIteration"):
        as_batch_size_fn(lambda _: next(iter([])))(None)
