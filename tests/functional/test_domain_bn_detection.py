"""domain_bn on whole torchvision detectors, unmodified: five levels, losses, detections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from lightning_bn import domain_bn, precise_bn
from tests.functional.domains import choices


def detector(kind: str) -> Any:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )  # fmt: skip
    anchors = AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64, 128)), ((1.0,),) * 5)
    options: Any = {"num_classes": 3, "anchor_generator": anchors, "min_size": 128, "max_size": 160}
    norm = nn.BatchNorm2d
    if kind == "RetinaNet":
        return RetinaNet(backbone, head=RetinaNetHead(256, 1, 3, norm_layer=norm), **options)
    head = FCOSHead(256, 1, 3, num_convs=2)
    head.classification_head = FCOSClassificationHead(256, 1, 3, num_convs=2, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(256, 1, num_convs=2, norm_layer=norm)
    return FCOS(backbone, head=head, **options)


@pytest.mark.parametrize("row", [1, 4])
@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_a_detector_trains_is_measured_and_evaluates(kind: str, row: int) -> None:
    model = detector(kind).train()
    handle = domain_bn(model, num_domains=5, level_modules="head.*_head", **choices(row))
    images = [torch.rand(3, 128, 128), torch.rand(3, 100, 160)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 60.0, 70.0]]), "labels": torch.tensor([1])}] * 2
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.head.parameters() if p.requires_grad)
    layer = model.head.classification_head.get_submodule("conv")[0 if kind == "RetinaNet" else 1]
    layer = layer[1] if kind == "RetinaNet" else layer
    assert int(layer.num_batches_tracked) == 1
    shapes: list[int] = []
    looking = model.head.register_forward_pre_hook(lambda _, args: shapes.extend(x[:, 0].numel() for x in args[0]))
    statistics = precise_bn(
        model, [images], forward=lambda m, b: m(b), layers="head.*", normalization_batch_size="loader"
    )
    looking.remove()
    assert len(shapes) == 5
    for measured in statistics.values():
        assert measured.count == sum(shapes)
        assert [own.count for own in measured.domains] == (shapes if row == 4 else [])
    assert {"boxes", "scores", "labels"} <= set(model.eval()(images)[0])
    handle.undo()
