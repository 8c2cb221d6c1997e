"""The one call of batch_norm inside a layer's forward is replaced, and nothing else of that forward."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bn.layers.batch_norm_call import with_batch_norm


@pytest.mark.parametrize("bn", [nn.BatchNorm2d(2), timm.layers.BatchNormAct2d(2)])
def test_the_replacement_is_given_what_batch_norm_would_have_been(bn: Any) -> None:
    given: dict[str, Any] = {}

    def replacement(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        given.update(locals())
        return input

    x = torch.randn(2, 2, 3, 3)
    y = with_batch_norm(replacement, "bn", bn, x)
    assert given["input"] is x and given["training"] is True and (given["momentum"], given["eps"]) == (0.1, 1e-5)
    assert all(given[name] is getattr(bn, name) for name in ("running_mean", "running_var", "weight", "bias"))
    torch.testing.assert_close(y, bn.act(x) if hasattr(bn, "act") else x)
    assert bn.num_batches_tracked == 1, "counted by the layer"


def test_the_replacement_may_call_batch_norm_itself() -> None:
    bn, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    torch.testing.assert_close(with_batch_norm(F.batch_norm, "bn", bn, x), F.batch_norm(x, None, None, training=True))


def test_outside_and_after_an_error_nothing_is_replaced() -> None:
    bn, x = nn.BatchNorm1d(2), torch.randn(4, 2)

    def broken(*_: Any, **__: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with_batch_norm(broken, "bn", bn, x)
    assert bn(x).shape == (4, 2)


def test_a_forward_without_such_a_call_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"forward of layer 'head\.0' does not call torch\.nn\.functional\.batch_norm"):
        with_batch_norm(F.batch_norm, "head.0", nn.ReLU(), torch.zeros(1))
