"""Ghost BN is plain BatchNorm of each group; the running statistics are those of plain BatchNorm of the batch."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn import ghost_bn
from tests.zoo import cnn, images

GROUPINGS = ["interleaved", "contiguous"]
LAYERS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def members(samples: int, groups: int, grouping: str) -> list[list[int]]:
    """Which samples make a group, from the definition."""
    everyone = list(range(samples))
    if grouping == "interleaved":
        return [[i for i in everyone if i % groups == k] for k in range(groups)]
    return [chunk.tolist() for chunk in torch.tensor(everyone).tensor_split(groups)]


def one_by_one(x: Tensor, bn: Any, groups: list[list[int]]) -> Tensor:
    rows: list[Any] = [None] * len(x)
    for group in groups:
        y = F.batch_norm(x[group], None, None, bn.weight, bn.bias, True, 0.0, bn.eps)
        for i, row in zip(group, y, strict=True):
            rows[i] = row
    return torch.stack(rows)


def layer(space: int = 2, channels: int = 3, **how: Any) -> Any:
    """A layer in float64 whose parameters and buffers are not the identity."""
    bn = LAYERS[space](channels, dtype=torch.float64, **how)
    for tensor in bn.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    return bn


def gradients(y: Tensor, x: Tensor, bn: nn.Module) -> tuple[Tensor, ...]:
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return torch.autograd.grad((y * upstream).sum(), [x, *bn.parameters()])


def assert_ghosts(bn: Any, x: Tensor, groups: list[list[int]], **tolerance: float) -> None:
    """One training forward of a layer with ghosts and its gradients are those of the definition."""
    plain = copy.deepcopy(bn)
    plain(x)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    expected = one_by_one(x, plain, groups)
    y = bn(x)
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(gradients(y, x, bn), gradients(expected, x, plain), **tolerance)
    torch.testing.assert_close(bn.state_dict(), plain.state_dict(), **tolerance)


@settings(max_examples=120)
@given(
    samples=st.integers(2, 23),
    number=st.integers(1, 25),
    how=st.sampled_from(["size", "splits"]),
    space=st.integers(0, 3),
    pixels=st.integers(1, 3),
    grouping=st.sampled_from(GROUPINGS),
    momentum=st.sampled_from([0.1, 1.0, 0.0, None]),
    lacks=st.sampled_from(["nothing", "affine", "track_running_stats", "bias"]),
    layout=st.sampled_from(["dense", "channels last", "with gaps"]),
)
def test_size_is_the_most_samples_in_a_group_splits_their_number_and_every_group_is_plain_batchnorm(
    samples: int, number: int, how: Any, space: int, pixels: int, grouping: str, momentum: Any, lacks: str, layout: str
) -> None:
    x = torch.randn(samples, 3, *[pixels] * space, 2, dtype=torch.float64)[..., 0] * 2 + 1
    x = {"dense": x.contiguous(), "channels last": x.movedim(1, -1).contiguous().movedim(-1, 1), "with gaps": x}[layout]
    bn = layer(space, momentum=momentum, **{lacks: False} if lacks in ("affine", "track_running_stats") else {})
    if lacks == "bias":
        bn.bias = None
    single = x[0, 0].numel() == 1
    groups = math.ceil(samples / number) if how == "size" else min(number, samples)
    expected = members(samples, min(groups, samples // 2) if single else groups, grouping)
    sizes = list(map(len, expected))
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1 + single
    assert max(sizes) <= number or single or how == "splits"
    with ghost_bn(bn, **{how: number}, grouping=grouping):
        assert_ghosts(bn, x, expected, rtol=1e-9, atol=1e-9)
        if layout == "channels last" and space > 1:
            of_torch = {2: torch.channels_last, 3: torch.channels_last_3d}[space]
            assert bn(x).is_contiguous(memory_format=of_torch)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_gradients_of_gradients_are_right(grouping: str) -> None:
    bn = layer()
    with ghost_bn(bn, splits=2, grouping=grouping):
        x = torch.randn(5, 3, 2, 1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(bn, x)
        assert torch.autograd.gradgradcheck(bn, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["float32", "16-bit"])
def test_16_bit_inputs_are_normalized_group_by_group_and_stay_16_bit(dtype: torch.dtype, parameters: str) -> None:
    x = (torch.randn(9, 3, 4, 4) + 20).to(dtype)
    bn = nn.BatchNorm2d(3, dtype=dtype if parameters == "16-bit" else None)
    plain = copy.deepcopy(bn)
    plain(x)
    with ghost_bn(bn, splits=2):
        y = bn(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), bn.weight)
    assert y.dtype == dtype and gradient.dtype == bn.weight.dtype
    expected = one_by_one(x.float(), nn.BatchNorm2d(3), members(9, 2, "interleaved"))
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(bn.state_dict(), plain.state_dict(), rtol=8e-3, atol=0)


def test_a_batch_of_one_value_or_none_is_what_it_is_without_ghosts() -> None:
    bn = nn.BatchNorm1d(2)
    with ghost_bn(bn, size=1):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            bn(torch.zeros(1, 2))
        assert bn(torch.zeros(0, 2)).shape == (0, 2)


@pytest.mark.parametrize(
    ("make", "samples"), [(nn.BatchNorm2d, 6), (lambda c: timm.layers.BatchNormAct2d(c, act_layer=nn.SiLU), 5)]
)
def test_a_compiled_model_is_one_graph_and_has_ghosts_too(make: Callable[[int], nn.Module], samples: int) -> None:
    model, x = cnn(make(8), dropout=0.0), images(samples)[0]
    eager = copy.deepcopy(model)
    with ghost_bn(model, size=2), ghost_bn(eager, size=2):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        y, expected = compiled(x), eager(x)
        y.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_sync_batchnorm_is_refused_by_name() -> None:
    model = cnn(nn.SyncBatchNorm(8))
    with pytest.raises(TypeError, match="Layer '1' is a SyncBatchNorm and cannot have Ghost BN"):
        ghost_bn(model, size=2)
    ghost_bn(model, size=2, layers="5").undo()
