"""With mini-batch inference a layer in eval mode is plain BatchNorm of the batch, and nothing of it is written."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bn import find_bn, freeze_bn, mini_batch_inference, precise_bn
from tests.zoo import CASES, case, cnn, images


def of_the_batch(x: Tensor, bn: Any) -> Tensor:
    return F.batch_norm(x, None, None, bn.weight, bn.bias, True, 0.0, bn.eps)


def assert_untouched(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


@pytest.mark.parametrize(
    ("momentum", "gradients"), [(0.1, contextlib.nullcontext), (1.0, torch.no_grad), (None, torch.inference_mode)]
)
def test_eval_normalizes_with_the_batch_and_writes_nothing(momentum: float | None, gradients: Any) -> None:
    bn = nn.BatchNorm2d(3, momentum=momentum)
    nn.init.uniform_(bn.weight), nn.init.uniform_(bn.bias), bn.running_mean.fill_(4)
    before, x = copy.deepcopy(dict(bn.named_buffers())), torch.randn(4, 3, 5, 5) * 3 + 7
    plain = copy.deepcopy(bn).eval()(x)
    with mini_batch_inference(bn), gradients():
        assert torch.equal(bn.eval()(x), of_the_batch(x, bn))
    assert_untouched(bn, before)
    assert type(bn) is nn.BatchNorm2d and torch.equal(bn(x), plain), "undone"


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("momentum 0",)])
def test_every_kind_of_layer_does_it(name: str) -> None:
    model, (x, *_) = case(name)
    if len(x) == 1:
        x = x.repeat(2, 1) + torch.arange(2.0).view(2, 1)
    before = copy.deepcopy(dict(model.named_buffers()))
    with mini_batch_inference(model) as handle, torch.no_grad():
        y = model.eval()(x)
    assert_untouched(model, before)
    assert handle.fallbacks == 0
    reference = copy.deepcopy(model)  # torch's own way: layers that never stored statistics
    for layer in find_bn(reference).values():
        layer.running_mean = layer.running_var = None
    with torch.no_grad():
        assert torch.equal(y, reference(x)) and not torch.equal(y, model(x))


def test_training_is_as_it_was() -> None:
    model, (x, *_) = case("float64 model")
    model[3].p = 0.0
    plain = copy.deepcopy(model)
    with mini_batch_inference(model):
        assert torch.equal(model.train()(x), plain.train()(x))
    assert_untouched(model, dict(plain.named_buffers()))
    assert model[1].num_batches_tracked == 1


def test_a_single_value_per_channel_takes_the_population_and_is_counted() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval()
    model[0].running_mean.fill_(3)
    x = torch.randn(1, 2)
    expected = model(x)
    with mini_batch_inference(model) as handle:
        assert torch.equal(model(x), expected)
        assert handle.fallbacks == 2, "both layers"
        model(torch.randn(2, 2))
        assert handle.fallbacks == 2
        assert model(torch.zeros(0, 2)).shape == (0, 2)
        assert handle.fallbacks == 2, "nothing to normalize is nothing to fall back from"


def test_a_single_sample_with_space_has_statistics() -> None:
    bn, x = nn.BatchNorm2d(3).eval(), torch.randn(1, 3, 4, 4)
    with mini_batch_inference(bn) as handle:
        assert torch.equal(bn(x), of_the_batch(x, bn)) and handle.fallbacks == 0


def test_a_subclass_keeps_its_activation() -> None:
    bn = timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU).eval()
    x = torch.randn(4, 3, 5, 5) + 3
    with mini_batch_inference(bn):
        torch.testing.assert_close(bn(x), F.silu(of_the_batch(x, bn)))


def test_layers_without_stored_statistics_do_it_anyway() -> None:
    bn = nn.BatchNorm1d(2, track_running_stats=False).eval()
    x = torch.randn(4, 2)
    plain = bn(x)
    with mini_batch_inference(bn):
        assert torch.equal(bn(x), plain)


def test_only_the_chosen_layers_do_it() -> None:
    model, x = cnn().eval(), images(4, mean=3)[0]
    plain = model[:2](x)
    with mini_batch_inference(model, layers="5"):
        assert torch.equal(model[:2](x), plain)
        assert not torch.equal(model(x), copy.deepcopy(model)(x))
    with pytest.raises(ValueError, match="matches no BatchNorm layer"):
        mini_batch_inference(model, layers="x")


@pytest.mark.parametrize(("mode", "frozen_first"), [(True, False), (False, True), (False, False)])
def test_frozen_layers_stay_frozen(mode: bool, frozen_first: bool) -> None:
    model, (x, *_) = case("float64 model")
    model[3].p = 0.0
    expected = copy.deepcopy(model).eval()(x)
    verbs: list[Callable[[nn.Module], Any]] = [freeze_bn, mini_batch_inference]
    with verbs[1 - frozen_first](model), verbs[frozen_first](model):
        assert torch.equal(model.train(mode)(x), expected)


def test_a_population_is_estimated_as_without() -> None:
    model, batches = case("SyncBatchNorm in one process")
    plain = copy.deepcopy(model)
    with mini_batch_inference(model) as handle:
        ours = precise_bn(model, batches)
        assert handle.fallbacks == 0
    for name, measured in precise_bn(plain, batches).items():
        assert torch.equal(ours[name].mean, measured.mean) and torch.equal(ours[name].var, measured.var)
