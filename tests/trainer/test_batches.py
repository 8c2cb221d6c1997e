"""Batches can be kept and run again, whatever holds them; `tests.functional.test_batches` has all kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_bn import BatchLeakageMonitor, PreciseBNCallback
from tests.callbacks.zoo import Images, TinyNet, digest, fit


@dataclass
class Validating:
    """As anomalib's ``ImageBatch``."""

    image: Tensor
    label: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor")
        super().__setattr__(name, value)


class Graphs:
    """As torch-geometric's: no collection, has a `to` method, and more rows than graphs."""

    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.store = {"nodes": torch.zeros(99, 2), "image": image, "label": label}
        self.num_graphs = len(image)

    def to(self, device: Any) -> Any:
        return Graphs(self.store["image"].to(device), self.store["label"].to(device))


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "dataclass that validates": (Validating, lambda b: (b.image, b.label)),
    "graphs": (Graphs, lambda b: (b.store["image"], b.store["label"])),
    "images and targets": (
        lambda x, y: (list(x), [{"label": label} for label in y]),
        lambda b: (torch.stack(b[0]), torch.stack([t["label"] for t in b[1]])),
    ),
}
"""Kind -> how it is made of images and labels, and how these are read from it."""


class OfKind(TinyNet):
    """Trains on batches of a kind, and changes them, as augmentations in place do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, read = KINDS[self.kind]
        images, labels = read(batch)
        loss = super().training_step((images.clone(), labels), batch_idx)
        images.zero_()
        return loss


def collated(kind: str, samples: list[Any]) -> Any:
    make, _ = KINDS[kind]
    return make(*default_collate(samples))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind_are_replayed_and_read_by_the_leakage_monitor_which_changes_nothing(kind: str) -> None:
    precise, monitor = PreciseBNCallback(num_samples=16, source="replay"), BatchLeakageMonitor(num_samples=32)
    module, truth = OfKind(kind), TinyNet()
    fit(module, [precise, monitor], DataLoader(Images(32), 8, collate_fn=partial(collated, kind)))
    fit(truth, PreciseBNCallback(num_samples=16, source="replay"), DataLoader(Images(32), 8))
    assert precise.result is not None and precise.result.num_samples == 16
    assert monitor.result is not None
    assert digest(module.state_dict()) == digest(truth.state_dict())
