"""Ghost BN is plain BatchNorm of each group; the running statistics are those of plain BatchNorm of the batch."""

from __future__ import annotations

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

from lightning_bn import find_bn, freeze_bn, ghost_bn, mini_batch_inference, precise_bn
from tests.zoo import CASES, Shared, case, cnn, images

GROUPINGS = ["interleaved", "contiguous"]
LAYERS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def members(samples: int, groups: int, grouping: str) -> list[list[int]]:
    """Which samples make a group, from the definition."""
    everyone = list(range(samples))
    if grouping == "interleaved":
        return [[i for i in everyone if i % groups == k] for k in range(groups)]
    return [chunk.tolist() for chunk in torch.tensor(everyone).tensor_split(groups)]


def one_by_one(x: Tensor, bn: Any, groups: list[list[int]]) -> Tensor:
    """Plain BatchNorm, group after group."""
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
    for ours, theirs in zip(gradients(y, x, bn), gradients(expected, x, plain), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    for (name, ours), theirs in zip(bn.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# --- the definition ---------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    samples=st.integers(2, 23),
    size=st.integers(1, 25),
    space=st.integers(0, 3),
    pixels=st.integers(1, 3),
    grouping=st.sampled_from(GROUPINGS),
    momentum=st.sampled_from([0.1, 1.0, 0.0, None]),
)
def test_size_is_the_most_samples_in_a_group_and_every_group_is_plain_batchnorm(
    samples: int, size: int, space: int, pixels: int, grouping: str, momentum: float | None
) -> None:
    x = torch.randn(samples, 3, *[pixels] * space, dtype=torch.float64) * 2 + 1
    bn = layer(space, momentum=momentum)
    groups = math.ceil(samples / size)
    single = x[0, 0].numel() == 1
    if single:
        groups = min(groups, samples // 2)
    expected = members(samples, groups, grouping)
    sizes = list(map(len, expected))
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1 + single and (max(sizes) <= size or single)
    with ghost_bn(bn, size=size, grouping=grouping):
        assert_ghosts(bn, x, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=50)
@given(samples=st.integers(2, 17), splits=st.integers(1, 20), grouping=st.sampled_from(GROUPINGS))
def test_splits_is_the_number_of_groups(samples: int, splits: int, grouping: str) -> None:
    bn = layer()
    with ghost_bn(bn, splits=splits, grouping=grouping):
        x = torch.randn(samples, 3, 2, 2, dtype=torch.float64)
        assert_ghosts(bn, x, members(samples, min(splits, samples), grouping), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("samples", [8, 7])
@pytest.mark.parametrize(
    "how",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"bias": False},
    ],
)
def test_layers_may_lack_weight_bias_or_statistics(how: dict[str, bool], samples: int, grouping: str) -> None:
    if how.pop("bias", True):
        bn = layer(**how)
    else:
        bn = layer()
        bn.bias = None
    with ghost_bn(bn, splits=3, grouping=grouping):
        assert_ghosts(bn, torch.randn(samples, 3, 4, 4, dtype=torch.float64), members(samples, 3, grouping))


def test_momentum_none_is_the_mean_over_batches_as_without_ghosts() -> None:
    ours, plain = layer(momentum=None), layer(momentum=None)
    with ghost_bn(ours, size=2):
        for samples in (6, 5, 4):
            x = torch.randn(samples, 3, 2, 2, dtype=torch.float64) + samples
            ours(x), plain(x)
    assert ours.num_batches_tracked == 3
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)


def test_the_variance_between_groups_is_in_the_running_variance() -> None:
    """Groups of constant samples have none within, so averaging theirs would store 0."""
    bn = layer(momentum=1.0)
    x = torch.arange(4.0, dtype=torch.float64).repeat_interleave(3 * 5).view(4, 3, 5)
    bn = layer(1, momentum=1.0)
    with ghost_bn(bn, splits=4):
        bn(x)
    torch.testing.assert_close(bn.running_var, torch.full((3,), x[:, 0].var().item(), dtype=torch.float64))


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("samples", [8, 7])
@pytest.mark.parametrize("space", [2, 3])
def test_channels_last_stays_channels_last(space: int, samples: int, grouping: str) -> None:
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[space]
    x = torch.randn(samples, 3, *[4] * space, dtype=torch.float64).contiguous(memory_format=layout)
    bn = layer(space)
    with ghost_bn(bn, splits=3, grouping=grouping):
        assert_ghosts(bn, x, members(samples, 3, grouping))
        assert bn(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [8, 7])
def test_an_activation_in_place_is_as_cheap_as_behind_plain_batchnorm(
    samples: int, layout: torch.memory_format
) -> None:
    """On a view, autograd clones the gradient in the backward of whatever works in place."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    with ghost_bn(model, splits=2):
        y = model(torch.randn(samples, 3, 2, 2).contiguous(memory_format=layout).requires_grad_())
    assert type(y.grad_fn).__name__ == "ReluBackward0" and not y._is_view()


@pytest.mark.parametrize("samples", [8, 7])
def test_an_input_with_gaps_in_memory_is_normalized_like_any(samples: int) -> None:
    bn = layer()
    with ghost_bn(bn, splits=3):
        for x in (torch.randn(samples, 4, 4, 3), torch.randn(samples, 3, 4, 8)[..., ::2].transpose(2, 3)):
            x = x.double()
            assert_ghosts(bn, x.movedim(-1, 1) if x.shape[1] != 3 else x, members(samples, 3, "interleaved"))


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
    bn, x = nn.BatchNorm2d(3), (torch.randn(9, 3, 4, 4) + 20).to(dtype)
    if parameters == "16-bit":
        bn.to(dtype)
    plain = copy.deepcopy(bn)
    plain(x)
    with ghost_bn(bn, splits=2):
        y = bn(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), bn.weight)
    assert y.dtype == dtype and gradient.dtype == bn.weight.dtype
    expected = one_by_one(x.float(), nn.BatchNorm2d(3), members(9, 2, "interleaved"))
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(bn.running_mean, plain.running_mean, rtol=8e-3, atol=0)
    torch.testing.assert_close(bn.running_var, plain.running_var, rtol=8e-3, atol=0)


def test_autocast_runs() -> None:
    model, x = cnn(), images(6)[0]
    with ghost_bn(model, size=2), torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32 and model[1].weight.grad.isfinite().all()


def test_one_value_in_the_whole_batch_is_refused_by_torch_as_ever() -> None:
    bn = nn.BatchNorm1d(2)
    with ghost_bn(bn, size=1), pytest.raises(ValueError, match="more than 1 value per channel"):
        bn(torch.zeros(1, 2))


def test_a_batch_without_samples_is_what_it_is_without_ghosts() -> None:
    bn = nn.BatchNorm2d(3)
    with ghost_bn(bn, size=2):
        assert bn(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)


def test_on_an_ordered_batch_interleaved_groups_break_up_pairs_and_contiguous_ones_keep_them() -> None:
    """c0, c0, c1, c1: what leaks is that a sample's neighbor in its group has its class (Fig. 8)."""
    x = torch.tensor([[1.0], [1.1], [5.0], [5.1]])
    y = {}
    for grouping in GROUPINGS:
        bn = nn.BatchNorm1d(1)
        with ghost_bn(bn, splits=2, grouping=grouping):
            y[grouping] = bn(x).flatten().sign().tolist()
    assert y == {"interleaved": [-1, -1, 1, 1], "contiguous": [-1, 1, -1, 1]}


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("SyncBatchNorm in one process",)])
def test_a_model_of_every_kind_trains_and_evaluates_as_before(name: str) -> None:
    model, batches = case(name)
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    if name == "one value per channel":
        batches = [torch.cat(batches)]
    with ghost_bn(model, size=2):
        for module in (model, plain):
            module.train()
            for child in module.modules():
                if isinstance(child, nn.Dropout):
                    child.p = 0.0
        model(batches[0]).float().sum().backward()
        plain(batches[0])
        first = next(iter(find_bn(plain)))
        ours, theirs = model.get_submodule(first), plain.get_submodule(first)
        near = {"rtol": 2e-2, "atol": 1e-3} if "16" in name else {"rtol": 2e-3, "atol": 1e-4}
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, **near)
        torch.testing.assert_close(ours.running_var, theirs.running_var, **near)
        assert list(model.state_dict()) == keys
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(batches[0]), plain.eval()(batches[0])), "eval"
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}


def test_a_subclass_keeps_its_activation() -> None:
    bn = timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU)
    x = torch.randn(6, 3, 4, 4)
    expected = F.silu(one_by_one(x, bn, members(6, 3, "interleaved")))
    with ghost_bn(bn, size=2):
        torch.testing.assert_close(bn(x), expected)
        assert bn.num_batches_tracked == 1


def test_a_subclass_that_computes_for_itself_is_refused_by_name() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean()) / x.std()

    model = nn.Sequential(nn.BatchNorm2d(3), Own(3))
    with (
        ghost_bn(model, size=2),
        pytest.raises(TypeError, match="forward of layer '1' does not call"),
    ):
        model(torch.randn(4, 3, 2, 2))
    with ghost_bn(model, size=2, layers="0"):
        model(torch.randn(4, 3, 2, 2))


def test_a_layer_called_twice_has_ghosts_in_both_calls() -> None:
    model = Shared().double()
    plain, x = copy.deepcopy(model), images(6)[0].double()
    with ghost_bn(model, size=3):
        model(x)
    plain(x)
    assert model.bn.num_batches_tracked == 2
    torch.testing.assert_close(model.bn.running_var, plain.bn.running_var)


def test_undoing_ends_it_and_only_chosen_layers_have_it() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).double()
    x = torch.randn(6, 2, dtype=torch.float64)
    handle = ghost_bn(model, size=2, layers="1")
    first = model[0](x)
    torch.testing.assert_close(first, F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(model[1](first), one_by_one(first, model[1], members(6, 3, "interleaved")))
    assert "ghosts of 2" in repr(model[1]) and "ghost" not in repr(model[0])
    handle.undo()
    assert type(model[1]) is nn.BatchNorm1d
    torch.testing.assert_close(model[1](x), F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("make", [nn.BatchNorm2d, lambda c: timm.layers.BatchNormAct2d(c, act_layer=nn.SiLU)])
@pytest.mark.parametrize("samples", [6, 5])
def test_a_compiled_model_is_one_graph_and_has_ghosts_too(make: Callable[[int], nn.Module], samples: int) -> None:
    model, x = cnn(make(8)), images(samples)[0]
    model[3].p = 0.0
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


# --- with other behaviors --------------------------------------------------------------------------------------------

Give = Callable[[nn.Module], Any]


def in_both_orders(first: Give, second: Give) -> list[tuple[Give, Give]]:
    return [(first, second), (second, first)]


@pytest.mark.parametrize("order", in_both_orders(lambda m: ghost_bn(m, size=2), freeze_bn))
def test_frozen_layers_stay_frozen(order: tuple[Give, Give]) -> None:
    model, (x, *_) = case("float64 model")
    model[3].p = 0.0
    expected, buffers = copy.deepcopy(model).eval()(x), copy.deepcopy(dict(model.named_buffers()))
    with order[0](model), order[1](model):
        assert torch.equal(model.train()(x), expected)
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


def test_a_population_is_estimated_from_whole_batches() -> None:
    """Also where the model's own forward asks for train mode."""
    model, batches = case("float64 model")
    plain = copy.deepcopy(model)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model[1].train()
        model[5].train()
        model(batch)

    with ghost_bn(model, size=2):
        ours = precise_bn(model, batches, forward=forward)
    theirs = precise_bn(plain, batches)
    for name, measured in theirs.items():
        assert torch.equal(ours[name].mean, measured.mean) and torch.equal(ours[name].var, measured.var)


@pytest.mark.parametrize("order", in_both_orders(lambda m: ghost_bn(m, size=2), mini_batch_inference))
def test_training_in_ghosts_and_inference_by_mini_batch_go_together(order: tuple[Give, Give]) -> None:
    bn = layer(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    with order[0](bn), order[1](bn):
        torch.testing.assert_close(bn.train()(x), one_by_one(x, bn, members(6, 3, "interleaved")))
        torch.testing.assert_close(bn.eval()(x), F.batch_norm(x, None, None, bn.weight, bn.bias, True))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({}, ValueError, "either size= or splits=, not size=None and splits=None"),
        ({"size": 2, "splits": 2}, ValueError, "either size= or splits="),
        ({"size": 0}, ValueError, "size must be at least 1 but is 0"),
        ({"splits": 1.5}, TypeError, "splits must be a whole number but is 1.5"),
        ({"size": 2, "grouping": "random"}, ValueError, "'interleaved', 'contiguous' but is 'random'"),
        ({"size": 2, "layers": "x"}, ValueError, r"layers='x' matches no BatchNorm layer.*There are: 1, 5"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(how: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ghost_bn(cnn(), **how)


def test_sync_batchnorm_is_refused_by_name() -> None:
    model = cnn(nn.SyncBatchNorm(8))
    with pytest.raises(TypeError, match="Layer '1' is a SyncBatchNorm and cannot have Ghost BN"):
        ghost_bn(model, size=2)
    ghost_bn(model, size=2, layers="5").undo()


def test_a_forward_set_on_an_instance_is_refused_by_name() -> None:
    model = cnn()
    model[5].forward = model[5].forward
    for verb in (lambda: ghost_bn(model, size=2), lambda: mini_batch_inference(model)):
        with pytest.raises(ValueError, match="Layer '5' has a forward set on the instance"):
            verb()


def test_ghosts_of_ghosts_are_refused_by_name() -> None:
    model = cnn()
    with ghost_bn(model, size=2, layers="5"), pytest.raises(ValueError, match="Layer '5' already has Ghost BN"):
        ghost_bn(model, size=4)
    ghost_bn(model, size=4).undo()
