"""SyncBN in one process: nothing to synchronize, and what is computed, all of it on one rank."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm.layers
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bn import Handle, find_bn, sync_bn
from lightning_bn.functional.sync import Synced
from tests.zoo import CASES, case, cnn, images


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one rank, in which everything is computed as over several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def synced(model: nn.Module) -> Handle:
    """What sync_bn does, past its refusal to do it for one rank."""
    layers = find_bn(model)
    return Handle(layers.values(), Synced(layers, None))


@pytest.mark.parametrize("group_size", [None, 8])
def test_one_process_changes_nothing_and_warns(group_size: int | None) -> None:
    model = cnn()
    with pytest.warns(UserWarning, match="changes nothing: there is one process") as warned:
        sync_bn(model, group_size=group_size)
    assert type(model[1]) is nn.BatchNorm2d and len(warned) == 1


def test_torchs_own_synced_layers_are_left_alone_unless_groups_are_asked_for() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(cnn())
    with pytest.raises(TypeError, match="'1' is torch's SyncBatchNorm"):
        sync_bn(model, group_size=2)
    with pytest.warns(UserWarning, match="changes nothing"):
        sync_bn(model)


def outcome(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Outputs, input and parameter gradients and buffers after a step on each batch."""
    seen = []
    for x in batches:
        torch.manual_seed(1)  # dropout
        x = x.clone().requires_grad_()
        output = model(x)
        output.square().sum().backward()
        seen += [output.detach(), x.grad]
    return [*seen, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("name", [n for n in CASES if "SyncBatchNorm" not in n and "one value" not in n])
def test_over_one_rank_every_kind_of_layer_computes_what_it_does_without(one_rank: None, name: str) -> None:
    model, batches = case(name)
    model, batches = model.double(), [x.double() for x in batches]
    expected = outcome(copy.deepcopy(model), batches)
    with synced(model):
        found = outcome(model, batches)
    rounding = 1e-6 if "1e4" in name else 1e-10
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("dtype", "layer_dtype"),
    [
        *((torch.bfloat16, torch.float32), (torch.float16, torch.float32)),  # as under autocast
        *((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)),
    ],
)
def test_16_bit_inputs_are_computed_in_float32_and_rounded_once(one_rank: None, dtype: Any, layer_dtype: Any) -> None:
    layer, oracle = nn.BatchNorm2d(3, momentum=1.0).to(layer_dtype), nn.BatchNorm2d(3, momentum=1.0).double()
    x = (torch.randn(64, 3, 8, 8) + 30).to(dtype).requires_grad_()
    dy = torch.randn(64, 3, 8, 8).to(dtype)
    with synced(layer):
        y = layer(x)
        y.backward(dy)
    x64 = x.detach().double().requires_grad_()
    expected = oracle(x64)
    expected.backward(dy.double())
    gradients = ((a.grad, b.grad) for a, b in zip(layer.parameters(), oracle.parameters(), strict=True))
    statistics = ((layer.running_mean, oracle.running_mean), (layer.running_var, oracle.running_var))
    for ours, theirs in [(y, expected), (x.grad, x64.grad), *gradients, *statistics]:
        rounding = torch.finfo(ours.dtype).eps if ours.element_size() == 2 else 1e-5
        torch.testing.assert_close(ours.double(), theirs, rtol=rounding, atol=2e-5)
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, layer_dtype)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_gradients_to_be_differentiated_are_the_others(one_rank: None, dtype: Any, rounding: float) -> None:
    bn, x = nn.BatchNorm2d(3).to(dtype), (torch.randn(8, 3, 4, 4) + 30).to(dtype).requires_grad_()
    with synced(bn):
        first, second = (
            torch.autograd.grad(bn(x).pow(3).sum(), [x, *bn.parameters()], create_graph=create_graph)
            for create_graph in (True, False)
        )
    assert [g.dtype for g in (*first, *second)] == [dtype] * 6
    torch.testing.assert_close(first, second, rtol=rounding, atol=rounding)


def test_one_value_is_refused_as_torch_does_and_in_eval_mode_the_layer_is_a_plain_one(one_rank: None) -> None:
    bn, without_statistics = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False).eval()
    x = torch.randn(4, 8, 3) + 2
    with synced(nn.Sequential(bn, without_statistics)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            bn(torch.randn(1, 8))
        bn(torch.randn(0, 8))
        assert bn.running_mean.eq(0).all() and bn.running_var.eq(1).all()
        assert torch.equal(bn.eval()(x), nn.BatchNorm1d(8).eval()(x))
        torch.testing.assert_close(without_statistics(x), nn.BatchNorm1d(8)(x))
        assert "synced over 1 ranks" in repr(bn)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_it_gives_what_it_gives_eagerly(one_rank: None, fullgraph: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), timm.layers.BatchNormAct2d(4))
    model.train(not fullgraph)
    (x,) = images(4)
    eager = outcome(copy.deepcopy(model), [x, x])
    torch._dynamo.reset()
    with synced(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        torch.testing.assert_close(outcome(compiled, [x, x]), eager, rtol=1e-4, atol=1e-4)
