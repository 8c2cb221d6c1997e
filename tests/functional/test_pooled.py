"""A normalization batch of micro-batches is the batch of all their samples, whatever the network and the partition."""

import copy
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given as example
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import PopulationStatistics, find_bn, freeze_bn, precise_bn
from lightning_bn.functional.measure import MeasureConfig, measure
from lightning_bn.functional.precise import estimable_layers
from lightning_bn.lockstep.scheduler import LockstepError
from tests.layer_by_layer import layer_by_layer
from tests.truth import assert_close_to, assert_stored, in_double
from tests.zoo import CASES, case, cnn, images

jointly = partial(precise_bn, normalization_batch_size="population")


def assert_exact(model: nn.Module, batches: Any, truth: Any, **kwargs: Any) -> PopulationStatistics:
    """A pass in lockstep finds what an oracle does, to the last digits of float64."""
    statistics = precise_bn(model, batches, **{"normalization_batch_size": "population", **kwargs})
    assert_close_to(statistics, truth, sigma=1e-10, var=1e-10)
    return statistics


def population(samples: int, pixels: int) -> Tensor:
    """Images of different brightness and contrast: small batches of them lie far from each other."""
    x = torch.randn(samples, 3, pixels, pixels) * (1 + torch.rand(samples, 1, 1, 1))
    return x + torch.randn(samples, 3, 1, 1)


def in_float64(*sizes: int) -> tuple[nn.Sequential, list[Tensor]]:
    return cnn().double(), [x.double() for x in images(*sizes)]


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm BatchNormAct2d": lambda: timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=3),
    "MobileNetV2": lambda: torchvision.models.mobilenet_v2(weights=None),
    "DenseNet-121": lambda: torchvision.models.densenet121(weights=None),
    "ResNet-50": lambda: torchvision.models.resnet50(weights=None),
}
FIRST, *LARGE = NETWORKS


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.heavy) for name in LARGE)])
def test_micro_batches_are_one_batch_to_the_last_digits(name: str) -> None:
    model, x = NETWORKS[name]().double(), population(16, 32).double()
    truth = in_double(model, [x])
    statistics = assert_exact(model, x.split([5, 1, 8, 2]), truth)
    assert_stored(model, statistics)
    assert (statistics.num_samples, statistics.num_batches, statistics.batch_size) == (16, 4, 16)
    with pytest.raises(AssertionError):  # one pass over the same micro-batches is far off
        assert_close_to(precise_bn(model, x.split(2), normalization_batch_size="loader"), truth, 0.05, 0.05)


@settings(max_examples=20)
@example(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_the_partition_does_not_matter(partition: list[int], channels_last: bool) -> None:
    torch.manual_seed(0)
    model, x = cnn().double(), population(sum(partition), 6).double()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert_exact(model, x.split(partition), in_double(model, [x]))


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_is_estimated_as_layer_by_layer(name: str) -> None:
    model, batches = case(name)
    if "16" in name:
        real = precise_bn(copy.deepcopy(model), [torch.cat(batches)], normalization_batch_size="loader")
        for layer, measured in jointly(model, batches).items():
            spread = 2e-2 if "mean 100" not in name else 0.5
            assert ((measured.mean - real[layer].mean).abs() <= spread * real[layer].var.sqrt()).all(), layer
    else:
        statistics = jointly(model, batches)
        in_fp64 = layer_by_layer(model.double(), [x.double() for x in batches])
        large = 5e-3 if "1e4" in name else 0.0  # what rounding every value of such a mean to float32 does
        assert_close_to(statistics, in_fp64, sigma=2e-5 + large, var=1e-4 + large)


def test_images_of_different_sizes_are_one_batch_of_all_their_pixels() -> None:
    model = cnn().double()
    batches = [torch.randn(n, 3, height, width).double() + n for n, height, width in ((2, 8, 8), (1, 5, 12), (3, 9, 4))]
    assert_exact(model, batches, layer_by_layer(model, batches))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.how = block(inputs, outputs), how

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
    return torch.cat([layers(x), layers(x.flip(-1) + 1)], 1)[:, : layers[1].num_features]


HOW: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "the layer's own gradient": (with_gradient, 1),
    "called twice": (in_pieces, 2),
    "reentrant checkpointing": (lambda layers, x: checkpoint(layers, x.requires_grad_(), use_reentrant=True), 1),
    "checkpointing": (lambda layers, x: checkpoint(layers, x.requires_grad_(), use_reentrant=False), 1),
}
"""What a network does around its layers, and how often it calls them."""


@pytest.mark.parametrize("name", HOW)
def test_what_a_network_does_around_its_layers_does_not_matter(name: str) -> None:
    how, calls = HOW[name]
    model, (_, batches) = network(how), in_float64(3, 2, 1)
    # the gradient is of the batch alone: that of one batch of all would be another
    statistics = assert_exact(model, batches, layer_by_layer(model, batches))
    assert all(s.calls == calls for s in statistics.values())
    assert_exact(model, batches, in_double(model, batches), normalization_batch_size="loader")


def test_forward_hooks_run_once_for_every_micro_batch_and_are_seen() -> None:
    model, batches = in_float64(3, 2, 1)
    truth = in_double(model, [torch.cat(batches)])
    sizes: list[int] = []
    model[1].register_forward_hook(lambda layer, args, output: sizes.append(len(output)))
    for shift in (1, -1):
        model[1].register_forward_pre_hook(lambda layer, args, shift=shift: (args[0] + shift,))
    assert_exact(model, batches, truth)
    assert sizes[0] == sizes[-1] == 3, "the first one alone, before and behind"
    assert sorted(sizes[1:-1]) == [1, 2, 3]


def test_frozen_and_unchosen_layers_normalize_with_what_they_store() -> None:
    model, batches = in_float64(3, 2, 1)
    nn.init.normal_(model[1].running_mean)
    expected = layer_by_layer(model, batches, layers="5")
    stored = model[1].running_mean.clone()
    assert_exact(model, batches, expected, layers="5")
    freeze_bn(model, layers="1")
    assert_exact(model, batches, expected)
    assert torch.equal(model[1].running_mean, stored)


@pytest.mark.parametrize("memory_limit", [None, 1])
def test_sparse_tensors_inside_a_forward_are_no_obstacle(memory_limit: int | None) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        edges = torch.eye(len(x), dtype=x.dtype).to_sparse()
        return model[2:](edges @ model[:2](x))

    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    x = torch.randn(9, 4).double()
    assert_exact(model, x.split(2), in_double(model, [x], forward), forward=forward, memory_limit=memory_limit)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "groups"),
    [
        ([4, 4, 4, 4], 5, [[4, 4], [4, 4]]),
        ([3, 4, 2, 5, 1], 6, [[3, 4], [2, 5], [1]]),
        ([2, 2, 2], 100, [[2, 2, 2]]),
        ([3], 100, [[3]]),
        ([2, 9, 2, 2], 9, [[2, 9], [2, 2]]),
        ([8, 8, 8], 8, [[8], [8], [8]]),
    ],
)
def test_groups_hold_whole_batches_as_few_as_reach_b(sizes: Any, batch_size: int, groups: list[list[int]]) -> None:
    model, batches = in_float64(*sizes)
    remaining = iter(batches)
    together = [torch.cat([next(remaining) for _ in group]) for group in groups]
    truth = in_double(model, together)
    statistics = assert_exact(model, batches, truth, normalization_batch_size=batch_size)
    assert statistics.batch_size == pytest.approx(sum(sizes) / len(groups))
    assert (statistics.num_samples, statistics.num_batches) == (sum(sizes), len(sizes))
    close: Any = {"rtol": 1e-8, "atol": 0, "equal_nan": True}
    for name, alone in precise_bn(model, together, normalization_batch_size="loader").items():
        assert statistics[name].calls == len(groups)
        torch.testing.assert_close(statistics[name].standard_error, alone.standard_error, **close)
        torch.testing.assert_close(statistics[name].var_standard_error, alone.var_standard_error, **close)


def test_rather_than_too_much_memory_it_takes_a_smaller_b_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = cnn().double().eval(), population(16, 8).double()
    monkeypatch.setattr("lightning_bn.lockstep.pooled.free_memory", lambda device: 120_000)
    with pytest.warns(UserWarning) as warned:
        statistics = measure(estimable_layers(model), x.split(2), model, MeasureConfig())
    message = str(warned.pop().message)
    together = re.search(r"normalization batches of (\d+) samples, not of 100", message)
    assert together and 2 < int(together[1]) < 16 and "more than half" in message
    assert_close_to(statistics, in_double(model, x.split(int(together[1]))), sigma=1e-10, var=1e-10)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (("ab", "ba"), "number 1 was at a when number 3 was at b"),
        (("ab", "a"), "number 1 was at b when number 3 had ended"),
        (("a", "aba"), "number 1 had ended when number 3 was at b"),
    ],
)
def test_micro_batches_that_diverge_are_named_and_nothing_is_written(orders: tuple[str, str], message: str) -> None:
    model = nn.ModuleDict({name: nn.BatchNorm2d(3) for name in "ab"})
    before = copy.deepcopy(model.state_dict())

    def forward(model: Any, x: Tensor) -> None:
        for name in orders[len(x) == 1]:
            x = model[name](x)

    with pytest.raises(LockstepError, match=message) as raised:
        jointly(model, images(4, 4, 1), forward=forward)
    assert "layers=" in str(raised.value) and "batch_size" in str(raised.value), "what to do"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_that_keeps_something_between_layers_is_refused() -> None:
    model, found = cnn(), []
    model[0].register_forward_hook(lambda layer, args, output: found.append(output.mean()))
    model[4].register_forward_hook(lambda layer, args, output: output + 10 * found[-1])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LockstepError, match="'5' got a different input when batches were run jointly"):
        jointly(model, images(4, 4, 1))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(type(layer) is nn.BatchNorm2d for layer in find_bn(model).values())


def noisy(draw: Callable[[], float]) -> Callable[[Any, Tensor], Tensor]:
    return lambda layers, x: layers(x + draw())


def test_torchs_random_numbers_are_each_micro_batchs_own_and_the_global_ones_are_left_alone() -> None:
    model = network(noisy(lambda: float(torch.randn(()))))
    x = population(8, 10).double()
    before = torch.get_rng_state()
    first = jointly(model, x.split(2))
    assert torch.equal(torch.get_rng_state(), before)
    again = jointly(model, x.split(2))
    assert all(torch.equal(first[name].mean, again[name].mean) for name in first)
    torch.randn(1)
    other = jointly(model, x.split(2))
    assert not any(torch.equal(first[name].mean, other[name].mean) for name in first)


def test_a_loader_that_draws_random_numbers_is_no_obstacle_to_a_network_that_does_and_keeps_its_streams() -> None:
    model, x = network(noisy(lambda: float(torch.randn(())))), population(8, 10).double()

    def augmented() -> Iterator[Tensor]:
        for part in x.split(2):
            yield part + torch.randn(()) + float(np.random.randn()) + random.random()

    def streams_after(run: Callable[[], Any]) -> Any:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        run()
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    expected = streams_after(lambda: list(augmented()))
    assert streams_after(lambda: precise_bn(model, augmented(), normalization_batch_size=4)) == expected


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_random_numbers_of_others_are_refused_where_the_layers_see_them(draw: Callable[[], float]) -> None:
    """Only torch's can be given to each micro-batch; before the first layer, all draw in turn and nothing is lost."""
    batches = population(8, 10).double().split(2)
    with pytest.raises(LockstepError, match="draws its own random numbers"):
        jointly(network(noisy(draw)), batches)
    only_first = nn.Sequential(Block(3, 6, noisy(draw)), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).double()
    jointly(only_first, batches)
