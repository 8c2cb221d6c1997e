"""With mini-batch inference a layer in eval mode is plain BatchNorm of the batch, and nothing of it is written."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bn import find_bn, mini_batch_inference
from tests.zoo import CASES, case


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        *((name, torch.no_grad) for name in CASES),
        *(("ragged batches", contextlib.nullcontext), ("ragged batches", torch.inference_mode)),
    ],
)
def test_every_kind_of_layer_normalizes_with_the_batch_and_writes_nothing(name: str, gradients: Any) -> None:
    model, (x, *_) = case(name)
    if len(x) == 1:
        x = x.repeat(2, 1) + torch.arange(2.0).view(2, 1)
    before = copy.deepcopy(dict(model.named_buffers()))
    with mini_batch_inference(model) as handle, gradients():
        y = model.eval()(x)
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers())
    assert handle.fallbacks == 0
    reference = copy.deepcopy(model)  # torch's own way: layers that never stored statistics
    for layer in find_bn(reference).values():
        layer.running_mean = layer.running_var = None
    with torch.no_grad():
        assert torch.equal(y, reference(x)) and not torch.equal(y, model(x))


def test_a_single_value_per_channel_takes_the_population_and_is_counted() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval()
    model[0].running_mean.fill_(3)
    x = torch.randn(1, 2)
    expected = model(x)
    with mini_batch_inference(model) as handle:
        assert torch.equal(model(x), expected)
        assert handle.fallbacks == 2, "both layers"
        model(torch.randn(2, 2)), model(torch.randn(1, 2, 4))
        assert model(torch.zeros(0, 2)).shape == (0, 2)
        assert handle.fallbacks == 2, "nothing to normalize is nothing to fall back from"
