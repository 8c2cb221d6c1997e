"""Samples are counted as people count them; batches are copied as ``copy.deepcopy`` does, whatever holds them."""

import re
import threading
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import default_collate
from torchvision import tv_tensors

import lightning_bn.core.batch_copy as batch_copy
from lightning_bn.core.batch_copy import HostCopy, bytes_of, copied
from lightning_bn.core.batch_sizes import as_batch_size_fn, infer_batch_size

Pair = namedtuple("Pair", "x y")
Plain, Slots = (make_dataclass("Sample", ["x", ("y", Any, None)], slots=slots) for slots in (False, True))


class Graphs:
    """As torch-geometric's ``Batch``: more nodes than graphs."""

    def __init__(self, num_graphs: int) -> None:
        self.x, self.num_graphs = torch.zeros(5 * num_graphs + 1, 2), num_graphs


class Opaque:
    """As mmdet's ``DetDataSample``."""


def images(n: int, channels: int = 3) -> list[Tensor]:
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
    "two views": lambda n: [stacked(n), stacked(n)],
    "two views and labels": lambda n: [[stacked(n), stacked(n)], labels(n)],
    "crops of two sizes": lambda n: ([stacked(n, 3, 8, 8)] * 2 + [stacked(n)] * 6, labels(n), ["name"] * n),
    "dict": lambda n: {"pixel_values": stacked(n), "labels": labels(n), "size": (640, 480)},
    "UserDict": lambda n: UserDict(input_ids=stacked(n, 9), labels=labels(n)),
    "named tuple": lambda n: Pair(stacked(n), labels(n)),
    "dataclass": lambda n: Plain(stacked(n), labels(n)),
    "scalars before the data": lambda n: {"scale": torch.tensor(0.5), "mode": "train", "x": stacked(n)},
    "boxes of all images in one tensor": lambda n: (stacked(n), torch.zeros(11, 6)),
    "texts": lambda n: ["text"] * n,
    "two loaders": lambda n: {"a": [stacked(n), labels(n)], "b": [stacked(n + 3), labels(n + 3)]},
    "two loaders in a list": lambda n: [[stacked(n), labels(n)], [stacked(n + 3), labels(n + 3)]],
    "two loaders of dicts": lambda n: [{"x": stacked(n, 8), "y": labels(n)}, {"x": stacked(2, 8), "y": labels(2)}],
    "inputs and targets": lambda n: [{"x": stacked(n, 8)}, {"y": labels(n)}],
    "inputs and targets as dataclasses": lambda n: (Pair(stacked(n, 8), None), Slots(labels(n)), Graphs(n)),
    "batches in a tuple": lambda n: {"meta": ["a", None], "data": (Plain("b", stacked(n)), Plain("c", stacked(n)))},
    "loader of one tensor": lambda n: [stacked(n, 9)],
    "graphs": Graphs,
}
"""Kind of batch -> one of n samples that were put together."""
LISTED: dict[str, Callable[[int], Any]] = {
    "images": images,
    "images and targets": lambda n: (images(n), boxes(n)),
    "images and as many boxes as channels": lambda n: (images(n), boxes(n, 3)),
    "images of 13 bands and targets": lambda n: [images(n, 13), boxes(n)],
    "images and labels": lambda n: (images(n), labels(n)),
    "images and masks": lambda n: (images(n), [image[0] for image in images(n)]),
    "images and boxes in one tensor": lambda n: (images(n), torch.zeros(2 * n, 6)),
    "images and names": lambda n: {"names": ["name"] * n, "images": images(n, 2)},
    "videos and targets": lambda n: (boxes(n), [torch.zeros(3, 8, 6, 6)] * n),
    "equal point clouds and targets": lambda n: ([torch.zeros(100, 3)] * n, boxes(n)),
    "dicts": lambda n: [{"image": image, "height": 6, "id": i} for i, image in enumerate(images(n))],
    "dict of lists": lambda n: {"inputs": images(n), "data_samples": [Opaque()] * n},
    "pairs as the dataset gives them": lambda n: [(image, 5) for image in images(n)],
    "dataclasses": lambda n: [Plain(image, 1) for image in images(n)],
    "dataclass of lists": lambda n: Slots(images(n), boxes(n)),
}
"""Kind of batch -> one of n samples that stand in lists."""
PACKED: dict[str, Callable[[int], Any]] = {
    "packed sequences": packed,
    "packed sequences and labels": lambda n: (packed(n), labels(n)),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "object": (Opaque(), "a batch that is an Opaque: no part of it has a size"),
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


@kinds(COLLATED, LISTED, PACKED)
def test_samples_are_counted_whatever_holds_them(kind: Callable[[int], Any]) -> None:
    for n in (5, 2, 1, 3, *([] if kind in PACKED.values() else [0])):
        assert infer_batch_size(kind(n)) == n


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


@settings(max_examples=50)
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


@pytest.mark.parametrize("said", [4, 4.0, np.int64(4), torch.tensor(4)])
def test_whole_numbers_of_any_type_are_counts(said: Any) -> None:
    assert as_batch_size_fn(lambda _: said)(None) == 4
    assert as_batch_size_fn(None) is infer_batch_size


NUMBER = r"batch_size_fn must return .* but returned (-1|nan|inf|2\.5|tensor).* for a NoneType"
TYPE = r"batch_size_fn must return .* for a NoneType"


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        *((lambda _, n=n: n, ValueError, NUMBER) for n in (-1, float("nan"), float("inf"), 2.5, torch.tensor(-1))),
        *((lambda _, n=n: n, TypeError, TYPE) for n in (None, "4", True, torch.zeros(2))),
        (5, TypeError, r"batch_size_fn must be a function .* but is 5"),
        (lambda _: next(iter([])), RuntimeError, "batch_size_fn raised StopIteration"),
    ],
)
def test_what_is_no_number_of_samples_is_refused(count: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_batch_size_fn(count)(None)


@dataclass(frozen=True, slots=True)
class Frozen:
    image: Tensor
    size: int = field(default=3, init=False)


class Graph:
    """Moves by a method of its own and knows its device, as those of graph libraries do."""

    def __init__(self, x: Tensor) -> None:
        self.store = {"x": x}
        self.device = x.device

    def to(self, device: Any) -> Any:
        return Graph(self.store["x"].to(device))


HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda t: t, lambda b: b),
    "list in a dict": (lambda t: {"x": [t, "name"]}, lambda b: b["x"][0]),
    "UserDict": (lambda t: UserDict(x=t), lambda b: b["x"]),
    "frozen dataclass with slots": (Frozen, lambda b: b.image),
    "object": (Graph, lambda b: b.store["x"]),
    "attribute of a tensor": (lambda t: setattr_of(torch.zeros(2), t), lambda b: b.origin),
}
TENSORS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.arange(12.0).view(3, 4),
    "part of a large one": lambda: torch.arange(1000.0).view(10, 100)[2:5, ::25],
    "expanded": lambda: torch.ones(3, 1).expand(3, 4),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "leaf that requires grad": lambda: torch.ones(3, requires_grad=True),
    "result that requires grad": lambda: torch.ones(3, requires_grad=True) * 2,
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "image of torchvision": lambda: tv_tensors.Image(torch.ones(3, 4, 4)),
    "boxes of torchvision": lambda: tv_tensors.BoundingBoxes(torch.ones(2, 4), format="XYXY", canvas_size=(3, 3)),
    "no values": lambda: torch.zeros(0, 3),
}


def setattr_of(holder: Tensor, value: Tensor) -> Tensor:
    holder.origin = value  # type: ignore[attr-defined]
    return holder


def dense(tensor: Tensor) -> Tensor:
    return tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("copy_of", [copied, lambda batch: HostCopy(batch).batch()], ids=["copied", "HostCopy"])
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", TENSORS)
def test_a_copy_is_equal_and_shares_nothing(kind: str, holder: str, copy_of: Callable[[Any], Any]) -> None:
    tensor, (put, get) = TENSORS[kind](), HOLDERS[holder]
    batch = put(tensor)
    once, twice = copy_of((batch, batch))
    twin = get(once)
    assert once is twice and type(once) is type(batch) and type(twin) is type(tensor)
    assert get(batch) is tensor and twin is not tensor
    assert torch.equal(dense(twin), dense(tensor))
    assert (twin.is_leaf, twin.requires_grad) == (True, tensor.requires_grad)
    if tensor.layout == torch.strided and tensor.numel():
        assert twin.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        assert twin.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    elif tensor.numel():
        assert twin.values().data_ptr() != tensor.values().data_ptr() if tensor.layout != torch.sparse_coo else True


@pytest.mark.parametrize("holder", HOLDERS)
def test_bytes_are_those_of_each_tensor_once(holder: str) -> None:
    batch = HOLDERS[holder][0](torch.arange(1000.0).view(10, 100)[:3, :4])
    own = 48 + (8 if holder == "attribute of a tensor" else 0)
    assert bytes_of(batch) == bytes_of([batch, batch]) == own
    assert bytes_of((batch, torch.eye(1000).to_sparse())) == own + 1000 * (8 + 8 + 4)  # not of the zeros


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """From where and to where; the meta device, which is always there, stands for the GPU."""
    moved: list[tuple[str, str]] = []

    def clone(tensor: Tensor, device: torch.device) -> Tensor:
        moved.append((tensor.device.type, device.type))
        return torch.empty_like(tensor, device=device)

    monkeypatch.setattr(batch_copy, "_clone", clone)
    return moved


@pytest.mark.parametrize("holder", HOLDERS)
def test_each_tensor_waits_on_the_host_and_comes_back_to_its_device(holder: str, moves: list[tuple[str, str]]) -> None:
    put, get = HOLDERS[holder]
    kept = HostCopy((put(torch.zeros(3, device="meta")), torch.zeros(2)))
    assert sorted(set(moves)) == [("cpu", "cpu"), ("meta", "cpu")]
    for _ in range(2):
        batch, beside = kept.batch()
        assert (get(batch).device.type, beside.device.type) == ("meta", "cpu")
        assert not isinstance(batch, Graph) or batch.device == get(batch).device


def test_the_sizes_in_a_packed_sequence_stay_on_the_host(moves: list[tuple[str, str]]) -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    on_device = PackedSequence(packed.data.to("meta"), packed.batch_sizes)
    twin = HostCopy({"x": on_device}).batch()["x"]
    assert isinstance(twin, PackedSequence)
    assert (twin.data.device.type, twin.batch_sizes.device.type) == ("meta", "cpu")


def test_what_cannot_be_copied_is_refused_with_the_way_out() -> None:
    batch = {"x": torch.zeros(2), "lock": threading.Lock()}
    for copy_of in (copied, HostCopy, bytes_of):
        with pytest.raises(TypeError, match=r"Cannot copy a batch of type dict \(.*lock.*\)\. Remove what"):
            copy_of(batch)
