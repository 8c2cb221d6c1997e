"""Whole torchvision detectors, unmodified: frozen parts, lists of images, a head that gets RoIs or none, levels."""

import copy
from collections import OrderedDict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead

from lightning_bn import domain_bn, find_bn, precise_bn
from tests.functional.domains import choices
from tests.layer_by_layer import layer_by_layer
from tests.truth import assert_close_to, assert_measured, assert_stored, recorded

of_images = partial(precise_bn, forward=nn.Module.__call__)
SIZES = [[(64, 64), (48, 90)], [(70, 64)]]
HEAD = "roi_heads.box_head.0.1"


class Pyramid(nn.Sequential):
    """Convolutions with BatchNorm, each a feature level of half the size."""

    def __init__(self, levels: int, channels: int = 8) -> None:
        convs = [nn.Conv2d(c, channels, 3, 2, 1) for c in (3, *[channels] * (levels - 1))]
        super().__init__(*(nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()) for conv in convs))
        self.out_channels = channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        features = OrderedDict()
        for number, level in enumerate(self):
            features[str(number)] = x = level(x)
        return features


@pytest.fixture
def detector() -> Any:
    """In train mode, the first layer frozen by its user, BatchNorm in the box head."""
    model = FasterRCNN(
        Pyramid(2),
        **{"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 8},
        rpn_anchor_generator=AnchorGenerator(((16,), (32,)), ((1.0,),) * 2),
        box_head=FastRCNNConvFCHead((8, 7, 7), [8], [16], norm_layer=nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(16, 3),
    )
    for layer in find_bn(model).values():
        nn.init.normal_(layer.running_mean, std=0.1)
    model.backbone[0][1].requires_grad_(False).eval()
    return model


def batches() -> list[list[Tensor]]:
    return [[torch.rand(3, *size) * (1 + i) for size in sizes] for i, sizes in enumerate(SIZES)]


def test_trained_layers_are_measured_and_frozen_ones_left_alone(detector: Any) -> None:
    before = copy.deepcopy(detector.state_dict())
    with recorded(detector) as calls:
        statistics = of_images(detector, batches(), batch_size_fn=len, normalization_batch_size="loader")
    assert list(statistics) == ["backbone.1.1", HEAD] and statistics.num_samples == 3
    assert_measured(statistics, {name: calls[name] for name in statistics}, sigma=2e-6, var=2e-5)
    assert_stored(detector, statistics)
    assert statistics[HEAD].count == 3 * 8 * 7 * 7, "all RoIs of all images"
    for key, value in detector.state_dict().items():
        written = key.rpartition(".")[0] in statistics and key.endswith(("running_mean", "running_var"))
        assert torch.equal(value, before[key]) is not written, key
    assert {name for name, layer in find_bn(detector).items() if not layer.training} == {"backbone.0.1"}


@pytest.mark.parametrize(("without_rois", "count"), [(1, 16), (2, 0)])
def test_images_without_rois_count_for_nothing_in_the_head(detector: Any, without_rois: int, count: int) -> None:
    def detect_or_not(model: Any, batch: list[Tensor]) -> None:
        model.rpn.score_thresh = 2 if len(batch) <= without_rois else 0  # no proposal has a score of 2
        model(batch)

    before = copy.deepcopy(detector.roi_heads.box_head.state_dict())
    with recorded(detector) as calls:
        statistics = precise_bn(detector, batches(), forward=detect_or_not, normalization_batch_size="loader")
    assert [len(x) for x, _ in calls[HEAD]] == [count, 0]
    assert (HEAD in statistics) == bool(count)
    if count:
        assert statistics[HEAD].calls == 1
        assert_measured(statistics, {n: calls[n] for n in statistics}, sigma=2e-6, var=2e-5)
    else:
        assert all(torch.equal(before[k], v) for k, v in detector.roi_heads.box_head.state_dict().items())


def test_in_lockstep_a_detector_is_run_with_its_own_proposals(detector: Any) -> None:
    scenes = [[x.double() for x in batch] for batch in batches()]
    expected = layer_by_layer(detector.double().train(), scenes, nn.Module.__call__)
    statistics = of_images(detector, scenes, batch_size_fn=len, normalization_batch_size="population")
    assert_close_to(statistics, expected, sigma=1e-9, var=1e-9)


@pytest.mark.parametrize("row", [1, 4])
def test_a_detector_with_levels_trains_is_measured_and_evaluates(row: int) -> None:
    anchors = AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64, 128)), ((1.0,),) * 5)
    options: Any = {"num_classes": 3, "anchor_generator": anchors, "min_size": 64, "max_size": 80}
    model = RetinaNet(Pyramid(5), head=RetinaNetHead(8, 1, 3, norm_layer=nn.BatchNorm2d), **options)
    handle = domain_bn(model.train(), num_domains=5, level_modules="head.*_head", **choices(row))
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 80)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 45.0]]), "labels": torch.tensor([1])}] * 2
    sum(model(images, targets).values()).backward()
    assert all(p.grad is not None for p in model.head.parameters() if p.requires_grad)
    layers = find_bn(model.head)
    assert layers and all(int(layer.num_batches_tracked) == 1 for layer in layers.values())
    shapes: list[int] = []
    looking = model.head.register_forward_pre_hook(lambda _, args: shapes.extend(x[:, 0].numel() for x in args[0]))
    statistics = of_images(model, [images], layers="head.*", normalization_batch_size="loader")
    looking.remove()
    assert len(shapes) == 5
    for measured in statistics.values():
        assert measured.count == sum(shapes)
        assert [own.count for own in measured.domains] == (shapes if row == 4 else [])
    assert {"boxes", "scores", "labels"} <= set(model.eval()(images)[0])
    handle.undo()
