"""Batches are copied as ``copy.deepcopy`` does, whatever holds their tensors, and these come back where they were."""

from __future__ import annotations

import threading
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torchvision import tv_tensors

import lightning_bn.core.batch_copy as batch_copy
from lightning_bn.core.batch_copy import HostCopy, bytes_of, copied


@dataclass
class Validating:
    image: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor")
        super().__setattr__(name, value)


@dataclass(frozen=True, slots=True)
class Frozen:
    image: Tensor
    size: int = field(default=3, init=False)


class Graph:
    """Moves by a method of its own and knows its device, as those of graph libraries do."""

    def __init__(self, x: Tensor) -> None:
        self.store = {"x": x}
        self.device = x.device

    def to(self, device: Any) -> Graph:
        return Graph(self.store["x"].to(device))


HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda t: t, lambda b: b),
    "list in a dict": (lambda t: {"x": [t, "name"]}, lambda b: b["x"][0]),
    "UserDict": (lambda t: UserDict(x=t), lambda b: b["x"]),
    "dataclass that validates": (Validating, lambda b: b.image),
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
    put, _ = HOLDERS[holder]
    batch = put(torch.arange(1000.0).view(10, 100)[:3, :4])
    extra = 8 if holder == "attribute of a tensor" else 0
    assert bytes_of(batch) == bytes_of([batch, batch]) == 48 + extra
    assert bytes_of((batch, torch.eye(1000).to_sparse())) == 48 + extra + 1000 * (8 + 8 + 4)  # not of the zeros


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
