"""The one call of batch_norm inside a layer's forward is replaced, and nothing else of that forward."""

from itertools import product
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bn.layers.override import BatchNormCall, plain_call, replace_batch_norm, tracks


@pytest.mark.parametrize("bn", [nn.BatchNorm2d(2), timm.layers.BatchNormAct2d(2)])
def test_the_replacement_is_given_what_batch_norm_would_have_been(bn: Any) -> None:
    given: list[BatchNormCall] = []

    def replacement(call: BatchNormCall) -> Tensor:
        given.append(call)
        return call.input

    x = torch.randn(2, 2, 3, 3)
    y = replace_batch_norm(replacement, "bn", bn, x)
    (call,) = given
    assert call.input is x and call.training is True and (call.momentum, call.eps) == (0.1, 1e-5)
    assert all(getattr(call, name) is getattr(bn, name) for name in ("running_mean", "running_var", "weight", "bias"))
    torch.testing.assert_close(y, bn.act(x) if hasattr(bn, "act") else x)
    assert bn.num_batches_tracked == 1, "counted by the layer"


@pytest.mark.parametrize("bn", [nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None), nn.BatchNorm1d(2, affine=False)])
def test_the_known_call_of_torchs_own_layers_is_the_one_they_make(bn: Any) -> None:
    x = torch.randn(4, 2)
    for training, tracking in product((True, False), repeat=2):
        bn.train(training).track_running_stats = tracking
        known = plain_call(bn, x)
        made: list[BatchNormCall] = []
        replace_batch_norm(lambda call, made=made: (made.append(call), call.input)[1], "bn", bn, x)
        (call,) = made
        assert all(a is b for a, b in zip(known[:5], call[:5], strict=True)) and known.eps == call.eps
        assert known.training == call.training and tracks(bn, known) == tracks(bn, call)


def test_the_replacement_may_call_batch_norm_itself_and_after_an_error_nothing_is_replaced() -> None:
    bn, x = nn.BatchNorm1d(2), torch.randn(4, 2)

    def broken(_: BatchNormCall) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_batch_norm(broken, "bn", bn, x)
    expected = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(bn(x), expected)
    torch.testing.assert_close(replace_batch_norm(BatchNormCall.run, "bn", bn, x), expected)
    with pytest.raises(TypeError, match=r"forward of layer 'head\.0' does not call torch\.nn\.functional\.batch_norm"):
        replace_batch_norm(BatchNormCall.run, "head.0", nn.ReLU(), torch.zeros(1))
