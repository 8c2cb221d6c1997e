"""A normalization batch of micro-batches is the batch of all their samples, whatever the network and the partition."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given as example
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import Moments, PopulationStatistics, find_bn, freeze_bn, precise_bn
from lightning_bn.functional.measure import MeasureConfig, measure
from lightning_bn.functional.precise import estimable_layers
from lightning_bn.lockstep.scheduler import LockstepError
from tests.layer_by_layer import layer_by_layer
from tests.truth import assert_close_to, assert_stored, in_double
from tests.zoo import CASES, Shared, case, cnn, images

Forward = Callable[[Any, Any], Any]


def assert_equal_to(statistics: PopulationStatistics, truth: Mapping[str, Moments], sigma: float, var: float) -> None:
    """Statistics are the oracle's within ``sigma`` standard deviations and a relative error ``var``."""
    assert set(statistics) == {name for name, moments in truth.items() if moments.count.amax()}
    for name, measured in statistics.items():
        expected = truth[name]
        assert measured.count == int(expected.count.flatten()[0]), name
        assert ((measured.mean - expected.mean).abs() <= sigma * expected.var.sqrt() + 1e-300).all(), name
        assert ((measured.var - expected.var).abs() <= var * expected.var).all(), name


def population(samples: int, pixels: int) -> Tensor:
    """Images of different brightness and contrast: small batches of them lie far from each other."""
    x = torch.randn(samples, 3, pixels, pixels) * (1 + torch.rand(samples, 1, 1, 1))
    return x + torch.randn(samples, 3, 1, 1)


# --- networks, against a real forward of all samples as one batch -----------------------------------------------------


class UNet(nn.Module):
    """Two levels, with a skip."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
                nn.Conv2d(outputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            )

        self.down1, self.down2, self.bottom = block(3, 8), block(8, 16), block(16, 32)
        self.pool = nn.MaxPool2d(2)
        self.open2, self.open1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.up2, self.up1 = block(32, 16), block(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        up = self.up2(torch.cat([two, self.open2(self.bottom(self.pool(two)))], 1))
        return self.head(self.up1(torch.cat([one, self.open1(up)], 1)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Linear(32, 3),
    )


def timm_network() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=3)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "U-Net": (UNet, 16),
    "MLP": (mlp, 8),
    "timm BatchNormAct2d": (timm_network, 32),
    "MobileNetV2": (lambda: torchvision.models.mobilenet_v2(weights=None), 32),
    "DenseNet-121": (lambda: torchvision.models.densenet121(weights=None), 32),
    "ResNet-50": (lambda: torchvision.models.resnet50(weights=None), 32),
}
PARTITIONS: dict[str, list[int]] = {
    "one by one": [1] * 16,
    "2": [2] * 8,
    "8": [8] * 2,
    "ragged": [5, 1, 8, 2],
}


SMALL = ("U-Net", "MLP", "timm BatchNormAct2d")
"""Quick enough for all partitions, every time."""


@pytest.mark.parametrize("partitions", [["2"], pytest.param(list(PARTITIONS), marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", NETWORKS)
def test_micro_batches_are_one_batch_to_the_last_digits(name: str, partitions: list[str]) -> None:
    make, pixels = NETWORKS[name]
    model, x = make().double(), population(16, pixels).double()
    truth = in_double(model, [x])
    for partition in (PARTITIONS[p] for p in (PARTITIONS if name in SMALL else partitions)):
        statistics = precise_bn(model, x.split(partition), normalization_batch_size="population")
        assert_close_to(statistics, truth, sigma=1e-10, var=1e-10)
        assert_stored(model, statistics)
        assert statistics.num_samples == 16 and statistics.num_batches == len(partition)
        assert statistics.batch_size == 16


@pytest.mark.parametrize(
    "name", [n if n != "ResNet-50" else pytest.param(n, marks=pytest.mark.heavy) for n in NETWORKS]
)
def test_in_float32_they_are_as_close_as_a_real_forward(name: str) -> None:
    """To 1e-5 sigma, rms over channels, in float32; a real forward is as far from the truth."""
    make, pixels = NETWORKS[name]
    model, x = make(), population(32, pixels)
    truth = in_double(model, [x])
    real = precise_bn(copy.deepcopy(model), [x], normalization_batch_size="loader")
    statistics = precise_bn(model, x.split([8, 2, 1, 13, 8]), normalization_batch_size="population")
    for layer, rows in truth.items():
        mean, sigma = rows.mean(0), rows.std(0, correction=0)
        off, real_off = (((s[layer].mean - mean) / sigma).square().mean().sqrt() for s in (statistics, real))
        assert off <= 1e-5 and off <= max(2 * real_off, 1e-6), layer


def test_one_pass_over_the_same_micro_batches_is_far_off() -> None:
    model, x = UNet().double(), population(16, 16).double()
    truth = in_double(model, [x])
    with pytest.raises(AssertionError):
        assert_close_to(precise_bn(model, x.split(2), normalization_batch_size="loader"), truth, sigma=0.05, var=0.05)


@settings(max_examples=25)
@example(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_the_partition_does_not_matter(partition: list[int], channels_last: bool) -> None:
    torch.manual_seed(0)
    model, x = cnn().double(), population(sum(partition), 6).double()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    truth = in_double(model, [x])
    assert_close_to(
        precise_bn(model, x.split(partition), normalization_batch_size="population"), truth, sigma=1e-10, var=1e-10
    )


# --- every kind of layer, against the paper's algorithm ---------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if "16" not in n])
def test_every_kind_of_layer_is_estimated_as_layer_by_layer(name: str) -> None:
    model, batches = case(name)
    statistics = precise_bn(model, batches, normalization_batch_size="population")
    in_fp64 = layer_by_layer(model.double(), [x.double() for x in batches])
    large = 5e-3 if "1e4" in name else 0.0  # what rounding every value of such a mean to float32 does
    assert_equal_to(statistics, in_fp64, sigma=2e-5 + large, var=1e-4 + large)


@pytest.mark.parametrize("name", [n for n in CASES if "16" in n])
def test_16_bit_networks_are_estimated_as_what_they_are(name: str) -> None:
    """Within what rounding to 16 bits moves."""
    model, batches = case(name)
    alone, batch = copy.deepcopy(model), torch.cat(batches)
    real, statistics = (
        precise_bn(alone, [batch], normalization_batch_size="loader"),
        precise_bn(model, batches, normalization_batch_size="population"),
    )
    for layer, measured in statistics.items():
        sigma = real[layer].var.sqrt()
        spread = 2e-2 if "mean 100" not in name else 0.5
        assert ((measured.mean - real[layer].mean).abs() <= spread * sigma).all(), layer


def test_a_layer_called_several_times_normalizes_each_call_with_that_calls_statistics() -> None:
    model, batches = Shared().double(), [x.double() for x in images(4, 2, 1)]
    truth = in_double(model, [torch.cat(batches)])
    statistics = precise_bn(model, batches, normalization_batch_size="population")
    assert_close_to(statistics, truth, sigma=1e-10, var=1e-10)
    assert statistics["bn"].calls == 2


def test_images_of_different_sizes_are_one_batch_of_all_their_pixels() -> None:
    model = cnn().double()
    batches = [torch.randn(n, 3, height, width).double() + n for n, height, width in ((2, 8, 8), (1, 5, 12), (3, 9, 4))]
    statistics = precise_bn(model, batches, normalization_batch_size="population")
    assert_equal_to(statistics, layer_by_layer(model, batches), sigma=1e-10, var=1e-10)


@pytest.fixture(scope="module")
def detector() -> Any:
    """torchvision's Faster R-CNN with BatchNorm in its backbone and its box head."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

    torch.manual_seed(0)
    return FasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5),
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=8,
        box_head=FastRCNNConvFCHead((256, 7, 7), [8, 8], [1024], norm_layer=nn.BatchNorm2d),
    ).double()


SCENES = [[(64, 64), (48, 90)], [(70, 64)], [(64, 80), (50, 60), (64, 64)]]


def scenes() -> list[list[Tensor]]:
    """Lists of images of different sizes and brightness."""
    return [[torch.rand(3, *size).double() * (1 + i) for size in sizes] for i, sizes in enumerate(SCENES)]


def test_the_backbone_of_a_detector_is_estimated_as_layer_by_layer(detector: Any) -> None:
    batches = scenes()

    def backbone(model: Any, batch: list[Tensor]) -> Any:
        return model.backbone(model.transform(batch)[0].tensors)

    statistics = precise_bn(
        copy.deepcopy(detector),
        batches,
        forward=backbone,
        normalization_batch_size="population",
        layers="backbone.*",
        batch_size_fn=len,
    )
    expected = layer_by_layer(detector, batches, backbone, layers="backbone.*")
    assert_equal_to(statistics, expected, sigma=1e-10, var=1e-10)
    assert statistics.num_samples == 6


@pytest.mark.parametrize("without_rois", [False, True])
def test_the_box_head_of_a_detector_is_estimated_as_layer_by_layer(detector: Any, without_rois: bool) -> None:
    batches = []
    for scene in scenes():
        corners = [torch.rand(5, 2).double() * 40 for _ in scene]
        proposals = [torch.cat([c, c + 4 + torch.rand(5, 2).double() * 20], 1) for c in corners]
        batches.append((scene, proposals))
    if without_rois:
        batches[1] = (batches[1][0], [torch.zeros(0, 4).double()])

    def whole(model: Any, batch: tuple[list[Tensor], list[Tensor]]) -> Any:
        inputs = model.transform(batch[0])[0]
        return model.roi_heads.box_head(
            model.roi_heads.box_roi_pool(model.backbone(inputs.tensors), batch[1], inputs.image_sizes)
        )

    count = lambda batch: len(batch[0])  # noqa: E731
    statistics = precise_bn(
        copy.deepcopy(detector), batches, forward=whole, normalization_batch_size="population", batch_size_fn=count
    )
    assert_equal_to(statistics, layer_by_layer(detector, batches, whole), sigma=1e-10, var=1e-10)
    assert statistics["roi_heads.box_head.0.1"].count == 5 * (5 if without_rois else 6) * 7 * 7


def test_a_whole_detector_is_run_with_its_own_proposals(detector: Any) -> None:
    """Which depend on the statistics of layers before them: the same ones, then, as layer by layer."""
    batches = scenes()
    forward: Forward = lambda model, batch: model(batch)  # noqa: E731
    statistics = precise_bn(
        copy.deepcopy(detector), batches, forward=forward, normalization_batch_size="population", batch_size_fn=len
    )
    assert_equal_to(statistics, layer_by_layer(detector, batches, forward), sigma=1e-9, var=1e-9)


# --- networks that do something inside their forward ------------------------------------------------------------------


class Block(nn.Module):
    """Convolution, BatchNorm, ReLU, run by ``how``."""

    def __init__(self, inputs: int, outputs: int, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.layers, x)


def network(how: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(Block(3, 6, how), Block(6, 5, how), Block(5, 4, how)).double()


def with_gradient(layers: nn.Module, x: Tensor) -> Tensor:
    """A layer's own gradient scales what it returns."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = layers(x)
        (gradient,) = torch.autograd.grad(y.square().mean(), x)
    return y.detach() * (1 + gradient.abs().mean())


def in_pieces(layers: nn.Module, x: Tensor) -> Tensor:
    """The layer is called twice."""
    return torch.cat([layers(x), layers(x.flip(-1) + 1)], 1)[:, : layers[1].num_features]


def checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    return lambda layers, x: checkpoint(layers, x.requires_grad_(), use_reentrant=reentrant)  # type: ignore[no-any-return]


HOW: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the layer's own gradient": with_gradient,
    "called twice": in_pieces,
    "reentrant checkpointing": checkpointed(True),
    "checkpointing": checkpointed(False),
}


@pytest.mark.parametrize("name", HOW)
def test_what_a_network_does_around_its_layers_does_not_matter(name: str) -> None:
    model = network(HOW[name])
    batches = [x.double() for x in images(3, 2, 1)]
    expected = layer_by_layer(model, batches)
    # the gradient is of the batch alone: that of one batch of all would be another
    assert_equal_to(precise_bn(model, batches, normalization_batch_size="population"), expected, sigma=1e-10, var=1e-10)


def test_a_step_with_gradients_and_checkpointing_runs_backward_through_layers_in_lockstep() -> None:
    """Reentrant checkpointing runs them a second time, inside of the backward."""

    def how(layers: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = checkpoint(layers, x, use_reentrant=True)
            y.square().mean().backward()
        assert x.grad is not None
        return y.detach() * (1 + x.grad.abs().mean())

    model = network(how)
    batches = [x.double() for x in images(3, 2, 1)]
    statistics = precise_bn(model, batches, normalization_batch_size="population")
    assert_equal_to(statistics, layer_by_layer(model, batches), sigma=1e-10, var=1e-10)
    assert all(s.calls == 2 for s in statistics.values())


def test_a_compiled_model_runs_eagerly() -> None:
    model, batches = cnn().double(), [x.double() for x in images(3, 2, 1)]
    truth = in_double(model, [torch.cat(batches)])
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])
    statistics = precise_bn(compiled, batches, normalization_batch_size="population")
    assert_close_to({n.removeprefix("_orig_mod."): s for n, s in statistics.items()}, truth, sigma=1e-10, var=1e-10)
    model.compile(backend="eager")
    model(batches[0])
    assert_close_to(precise_bn(model, batches, normalization_batch_size="population"), truth, sigma=1e-10, var=1e-10)


def test_forward_hooks_run_once_for_every_micro_batch_and_are_seen() -> None:
    model, batches = cnn().double(), [x.double() for x in images(3, 2, 1)]
    truth = in_double(model, [torch.cat(batches)])
    sizes: list[int] = []
    model[1].register_forward_hook(lambda layer, args, output: sizes.append(len(output)))
    model[1].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    model[1].register_forward_pre_hook(lambda layer, args: (args[0] - 1,))
    assert_close_to(precise_bn(model, batches, normalization_batch_size="population"), truth, sigma=1e-10, var=1e-10)
    assert sizes[0] == sizes[-1] == 3, "the first one alone, before and behind"
    assert sorted(sizes[1:-1]) == [1, 2, 3]


def test_frozen_and_unchosen_layers_normalize_with_what_they_store() -> None:
    model, batches = cnn().double(), [x.double() for x in images(3, 2, 1)]
    nn.init.normal_(model[1].running_mean)
    expected = layer_by_layer(model, batches, layers="5")
    stored = model[1].running_mean.clone()
    assert_equal_to(
        precise_bn(model, batches, normalization_batch_size="population", layers="5"), expected, sigma=1e-10, var=1e-10
    )
    freeze_bn(model, layers="1")
    assert_equal_to(precise_bn(model, batches, normalization_batch_size="population"), expected, sigma=1e-10, var=1e-10)
    assert torch.equal(model[1].running_mean, stored)


def test_inputs_without_rows_count_for_nothing() -> None:
    model = mlp().double()
    batches = [torch.randn(n, 192).double() for n in (3, 0, 2, 0)]
    truth = in_double(model, [torch.cat(batches)])
    assert_close_to(precise_bn(model, batches, normalization_batch_size="population"), truth, sigma=1e-10, var=1e-10)


def test_sparse_tensors_inside_a_forward_are_no_obstacle() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.bn, self.two, self.bn2 = (
                nn.Linear(4, 5),
                nn.BatchNorm1d(5),
                nn.Linear(5, 3),
                nn.BatchNorm1d(3),
            )

        def forward(self, x: Tensor) -> Tensor:
            edges = torch.eye(len(x), dtype=x.dtype).to_sparse()
            return self.bn2(self.two(edges @ self.bn(self.one(x))))

    model, x = Graph().double(), torch.randn(9, 4).double()
    truth = in_double(model, [x])
    assert_close_to(precise_bn(model, x.split(2), normalization_batch_size="population"), truth, sigma=1e-10, var=1e-10)
    statistics = precise_bn(model, x.split(2), normalization_batch_size="population", memory_limit=1)
    assert_close_to(statistics, truth, sigma=1e-10, var=1e-10)


# --- groups of at least B samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "batch_size", "groups"),
    [
        ([4, 4, 4, 4], 8, [[4, 4], [4, 4]]),
        ([4, 4, 4, 4], 5, [[4, 4], [4, 4]]),
        ([3, 4, 2, 5, 1], 6, [[3, 4], [2, 5], [1]]),
        ([2, 2, 2], 100, [[2, 2, 2]]),
        ([2, 9, 2, 2], 9, [[2, 9], [2, 2]]),
    ],
)
def test_groups_hold_whole_batches_as_few_as_reach_b(
    sizes: list[int], batch_size: int, groups: list[list[int]]
) -> None:
    model = cnn().double()
    batches = [x.double() for x in images(*sizes)]
    together = [torch.cat(group) for group in _grouped(batches, groups)]
    truth = in_double(model, together)
    statistics = precise_bn(model, batches, normalization_batch_size=batch_size)
    assert_close_to(statistics, truth, sigma=1e-10, var=1e-10)
    assert statistics.batch_size == pytest.approx(sum(sizes) / len(groups))
    assert (statistics.num_samples, statistics.num_batches) == (sum(sizes), len(sizes))
    alone = precise_bn(model, together, normalization_batch_size="loader")
    for name, expected in alone.items():
        assert statistics[name].calls == len(groups)
        for key in ("standard_error", "var_standard_error"):
            torch.testing.assert_close(
                getattr(statistics[name], key), getattr(expected, key), rtol=1e-8, atol=0, equal_nan=True
            )


def _grouped(batches: list[Tensor], groups: list[list[int]]) -> Iterator[list[Tensor]]:
    remaining = iter(batches)
    for group in groups:
        yield [next(remaining) for _ in group]


def test_batches_that_are_large_enough_are_taken_as_they_come() -> None:
    model, batches = cnn(), images(8, 8, 8)
    forwards = []
    one_pass = precise_bn(copy.deepcopy(model), batches, normalization_batch_size="loader")
    model[1].register_forward_hook(lambda *_: forwards.append(1))
    statistics = precise_bn(model, batches, normalization_batch_size=8)
    assert len(forwards) == 3
    for name in one_pass:
        assert torch.equal(statistics[name].mean, one_pass[name].mean)
    assert statistics.batch_size == one_pass.batch_size == 8


def test_num_samples_bounds_a_population() -> None:
    model, x = cnn().double(), population(12, 8).double()
    truth = in_double(model, [x[:6]])
    seen = []
    batches = (seen.append(1) or part for part in x.split(2))  # type: ignore[func-returns-value]
    statistics = precise_bn(model, batches, normalization_batch_size="population", num_samples=5)
    assert_close_to(statistics, truth, sigma=1e-10, var=1e-10)
    assert statistics.num_samples == 6 and len(seen) == 3


def test_rather_than_more_than_a_share_of_the_memory_it_takes_a_smaller_b_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = cnn().double().eval(), population(16, 8).double()
    monkeypatch.setattr("lightning_bn.lockstep.pooled.free_memory", lambda device: 120_000)
    with pytest.warns(UserWarning) as warned:
        statistics = measure(estimable_layers(model), x.split(2), model, MeasureConfig())
    message = str(warned.pop().message)
    together = re.search(r"normalization batches of (\d+) samples, not of 100", message)
    assert together and 2 < int(together[1]) < 16 and "more than half" in message
    assert_close_to(statistics, in_double(model, x.split(int(together[1]))), sigma=1e-10, var=1e-10)


# --- micro-batches that cannot go together ----------------------------------------------------------------------------


class Branching(nn.Module):
    """Two layers, called as ``order`` says."""

    def __init__(self, order: Callable[[Tensor], str]) -> None:
        super().__init__()
        self.a, self.b, self.order = nn.BatchNorm2d(3), nn.BatchNorm2d(3), order

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order(x):
            x = getattr(self, name)(x)
        return x


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda x: "ab" if len(x) > 1 else "b", "number 1 was at a when number 3 was at b"),
        (lambda x: "ab" if len(x) > 1 else "ba", "number 1 was at a when number 3 was at b"),
        (lambda x: "ab" if len(x) > 1 else "a", "number 1 was at b when number 3 had ended"),
        (lambda x: "a" if len(x) > 1 else "aba", "number 1 had ended when number 3 was at b"),
    ],
)
def test_micro_batches_that_diverge_are_named_and_nothing_is_written(
    order: Callable[[Tensor], str], message: str
) -> None:
    model = Branching(order)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LockstepError, match=message) as raised:
        precise_bn(model, images(4, 4, 1), normalization_batch_size="population")
    assert "layers=" in str(raised.value) and "batch_size" in str(raised.value), "what to do"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class KeepsATensor(nn.Module):
    """Between layers, in an attribute: the last micro-batch's is what all of them find."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x).mean((0, 2, 3), keepdim=True)
        y = self.one(self.conv(x))
        return self.two(y + self.kept)


def test_a_model_that_keeps_something_between_layers_is_refused() -> None:
    model = KeepsATensor()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LockstepError, match="'two' got a different input when batches were run jointly"):
        precise_bn(model, images(4, 4, 1), normalization_batch_size="population")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_list_that_a_hook_fills_is_found_out() -> None:
    model, found = cnn(), []
    model[0].register_forward_hook(lambda layer, args, output: found.append(output.mean()))
    model[4].register_forward_hook(lambda layer, args, output: output + 10 * found[-1])
    with pytest.raises(LockstepError, match="'5' got a different input"):
        precise_bn(model, images(4, 4, 1), normalization_batch_size="population")


# --- random numbers ---------------------------------------------------------------------------------------------------


def noisy(draw: Callable[[], float]) -> Callable[[Any, Tensor], Tensor]:
    return lambda layers, x: layers(x + draw())


def in_a_fork() -> float:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return float(torch.randn(()))


def test_torchs_random_numbers_are_each_micro_batchs_own_and_the_global_ones_are_left_alone() -> None:
    model = network(noisy(lambda: float(torch.randn(()))))
    x = population(8, 10).double()
    before = torch.get_rng_state()
    first = precise_bn(model, x.split(2), normalization_batch_size="population")
    assert torch.equal(torch.get_rng_state(), before)
    again = precise_bn(model, x.split(2), normalization_batch_size="population")
    assert all(torch.equal(first[name].mean, again[name].mean) for name in first)
    torch.randn(1)
    other = precise_bn(model, x.split(2), normalization_batch_size="population")
    assert not any(torch.equal(first[name].mean, other[name].mean) for name in first)


def test_a_fork_of_random_numbers_around_a_layer_stays_with_its_micro_batch() -> None:
    def how(layers: nn.Module, x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            x = layers(x)
            return x + torch.randn(())

    model, batches = network(how), [x.double() for x in images(3, 2, 1)]
    truth = in_double(model, [torch.cat(batches)])
    before = torch.get_rng_state()
    assert_close_to(precise_bn(model, batches, normalization_batch_size="population"), truth, sigma=1e-10, var=1e-10)
    assert torch.equal(torch.get_rng_state(), before)


def augmented(x: Tensor) -> Iterator[Tensor]:
    """A loader that draws random numbers of all kinds."""
    for part in x.split(2):
        yield part + torch.randn(()) + float(np.random.randn()) + random.random()


def test_a_loader_that_draws_random_numbers_is_no_obstacle_to_a_network_that_does_and_keeps_its_streams() -> None:
    model, x = network(noisy(lambda: float(torch.randn(())))), population(8, 10).double()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    list(augmented(x))
    expected = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    precise_bn(model, augmented(x), normalization_batch_size=4)
    assert (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())) == expected


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_random_numbers_of_others_are_refused_where_the_layers_see_them(draw: Callable[[], float]) -> None:
    """Only torch's can be given to each micro-batch; before the first layer, all draw in turn and nothing is lost."""
    model = network(noisy(draw))
    with pytest.raises(LockstepError, match="draws its own random numbers"):
        precise_bn(model, population(8, 10).double().split(2), normalization_batch_size="population")
    only_first = nn.Sequential(Block(3, 6, noisy(draw)), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).double()
    precise_bn(only_first, population(8, 10).double().split(2), normalization_batch_size="population")


def test_find_bn_finds_plain_layers_behind_every_end() -> None:
    model = KeepsATensor()
    with pytest.raises(LockstepError):
        precise_bn(model, images(4, 4, 1), normalization_batch_size="population")
    assert all(type(layer) is nn.BatchNorm2d for layer in find_bn(model).values())
