"""PreciseBN on torchvision's Faster R-CNN: frozen parts, lists of images, a head that gets RoIs or none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from lightning_bn import find_bn, precise_bn
from tests.truth import assert_measured, assert_stored, recorded

Detector = FasterRCNN


@pytest.fixture
def detector() -> Detector:
    """In train mode, stem and first stage frozen by their user, BatchNorm in the box head."""
    model = FasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5),
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=8,
        box_head=FastRCNNConvFCHead((256, 7, 7), [8, 8], [1024], norm_layer=nn.BatchNorm2d),
    )
    for name, layer in find_bn(model).items():
        nn.init.normal_(layer.running_mean, std=0.1)
        if name.startswith(("backbone.body.bn1", "backbone.body.layer1")):
            layer.requires_grad_(False)
            layer.train(False)
        else:
            layer.train()
    return model


def detect(model: nn.Module, batch: list[Tensor]) -> Any:
    return model(batch)


def batches() -> list[list[Tensor]]:
    """Lists of images of different sizes."""
    return [[torch.rand(3, 64, 64), torch.rand(3, 48, 90)], [torch.rand(3, 70, 64)]]


def test_trained_layers_are_measured_and_frozen_ones_left_alone(detector: Detector) -> None:
    before = copy.deepcopy(detector.state_dict())
    with recorded(detector) as calls:
        statistics = precise_bn(detector, batches(), forward=detect, normalization_batch_size="loader")
    frozen = {n for n in find_bn(detector) if n.startswith(("backbone.body.bn1", "backbone.body.layer1"))}
    assert frozen and set(statistics) == set(find_bn(detector)) - frozen
    assert_measured(statistics, {name: c for name, c in calls.items() if name not in frozen}, sigma=2e-6, var=2e-5)
    assert_stored(detector, statistics)
    assert statistics["roi_heads.box_head.0.1"].count == 3 * 8 * 7 * 7, "all RoIs of all images"
    for key, value in detector.state_dict().items():
        written = key.rpartition(".")[0] in statistics and key.endswith(("running_mean", "running_var"))
        assert torch.equal(value, before[key]) is not written, key
    for name, layer in find_bn(detector).items():
        assert layer.training is (name not in frozen)


def test_the_samples_of_a_list_of_images_are_the_users_to_count(detector: Detector) -> None:
    statistics = precise_bn(
        detector, batches(), forward=detect, layers="roi_heads.*", batch_size_fn=len, normalization_batch_size="loader"
    )
    assert statistics.num_samples == 3
    assert list(statistics) == ["roi_heads.box_head.0.1", "roi_heads.box_head.1.1"]


def test_a_batch_without_rois_counts_for_nothing_in_the_head(detector: Detector) -> None:
    def detect_or_not(model: Any, batch: list[Tensor]) -> None:
        model.rpn.score_thresh = 2 if len(batch) == 1 else 0  # no proposal has a score of 2
        model(batch)

    with recorded(detector) as calls:
        statistics = precise_bn(detector, batches(), forward=detect_or_not, normalization_batch_size="loader")
    head = "roi_heads.box_head.0.1"
    assert [len(x) for x, _ in calls[head]] == [16, 0]
    assert statistics[head].calls == 1 and statistics[head].count == 16 * 7 * 7
    assert_measured(statistics, {n: calls[n] for n in statistics}, sigma=2e-6, var=2e-5)


def test_a_head_that_no_batch_gives_rois_keeps_its_statistics(detector: Detector) -> None:
    before = copy.deepcopy(detector.roi_heads.box_head.state_dict())
    detector.rpn.score_thresh = 2
    statistics = precise_bn(detector, batches(), forward=detect, normalization_batch_size="loader")
    assert not any(name.startswith("roi_heads") for name in statistics)
    assert all(torch.equal(before[k], v) for k, v in detector.roi_heads.box_head.state_dict().items())
