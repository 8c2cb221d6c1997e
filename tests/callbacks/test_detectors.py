"""PreciseBN on torchvision's detectors: they return other things in eval mode, and batches hold lists of images."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_bn import PreciseBNCallback
from tests.callbacks.zoo import Recorder, digest, fit, statistics_of


class Scenes(Dataset[Any]):
    """One bright box on noise, made on the fly."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        own = torch.Generator().manual_seed(index)
        image = torch.rand(3, 48, 48 + 8 * (index % 2), generator=own)
        x, y = torch.randint(0, 20, (2,), generator=own).tolist()
        image[:, y : y + 20, x : x + 20] += 1
        boxes = torch.tensor([[x, y, x + 20, y + 20]], dtype=torch.float32)
        return image, {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}


class Detector(LightningModule):
    """torchvision's Faster R-CNN on a two-layer backbone, the first BatchNorm frozen by its user."""

    def __init__(self) -> None:
        from torchvision.models.detection.faster_rcnn import AnchorGenerator, FasterRCNN, FastRCNNPredictor

        super().__init__()
        torch.manual_seed(0)
        conv = functools.partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
        layers = [m for width in (3, 8) for m in (conv(width, 8), nn.BatchNorm2d(8), nn.ReLU())]
        backbone: Any = nn.Sequential(*layers)
        backbone.out_channels = 8
        self.net = FasterRCNN(
            backbone,
            min_size=48,
            max_size=64,
            rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
            box_head=nn.Sequential(nn.Flatten(), nn.Linear(8 * 7 * 7, 16), nn.BatchNorm1d(16), nn.ReLU()),
            box_predictor=FastRCNNPredictor(16, 2),
            box_batch_size_per_image=16,
        )
        backbone[1].eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.net(*batch).values())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, _ = batch
        self.log("val_boxes", float(sum(len(found["boxes"]) for found in self.net(images))), batch_size=len(images))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def scenes() -> DataLoader[Any]:
    return DataLoader(Scenes(), batch_size=2, collate_fn=lambda items: tuple(zip(*items, strict=True)))


def count_images(batch: Any) -> int:
    return len(batch[0])


@pytest.mark.parametrize("source", ["train_dataloader", "replay"])
def test_a_pass_runs_a_detector_on_images_and_targets_and_keeps_its_frozen_layer(source: Any) -> None:
    precise = PreciseBNCallback(6, source=source, batch_size_fn=count_images)
    recorders, modules = (Recorder(), Recorder()), (Detector(), Detector())
    for module, recorder, callbacks in zip(modules, recorders, ([], [precise]), strict=True):
        fit(module, [*callbacks, recorder], scenes(), scenes())
    assert recorders[0].trace == recorders[1].trace
    assert (precise.result.num_samples, precise.result.num_batches) == (6, 3)
    assert list(precise.result) == ["net.backbone.4", "net.roi_heads.box_head.2"]
    assert precise.result["net.roi_heads.box_head.2"].count > 6, "the head sees boxes, not images"
    ema, ours = (statistics_of(m) for m in modules)
    assert digest(ours["net.backbone.1.running_mean"]) == digest(torch.zeros(8))
    assert digest(ours["net.backbone.4.running_mean"]) != digest(ema["net.backbone.4.running_mean"])
