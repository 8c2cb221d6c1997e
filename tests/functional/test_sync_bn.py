"""SyncBN in one process: nothing to synchronize, and arguments that cannot be met are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm.layers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bn import find_bn, freeze_bn, ghost_bn, sync_bn
from lightning_bn.functional.sync import Synced
from lightning_bn.layers.behavior import Handle, behaviors_of
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


@pytest.mark.parametrize("ranks", [None, 1, 8])
def test_one_process_changes_nothing_and_says_so(ranks: int | None) -> None:
    model = cnn()
    with (
        pytest.warns(UserWarning, match="changes nothing: there is one process") as said,
        sync_bn(model, group_size=ranks),
    ):
        assert not any(behaviors_of(layer) for layer in find_bn(model).values())
    assert len(said) == 1


@pytest.mark.parametrize(("ranks", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_ranks_must_be_a_whole_number(ranks: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="group_size must be"):
        sync_bn(cnn(), group_size=ranks)


def test_torchs_own_synced_layers_are_left_alone_unless_groups_are_asked_for() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(cnn())
    with pytest.raises(TypeError, match="'1' is torch's SyncBatchNorm"):
        sync_bn(model, group_size=2)
    with pytest.warns(UserWarning, match="changes nothing"):
        sync_bn(model)


def test_a_layer_is_either_cut_up_or_put_together_and_the_refusal_says_which_in_both_orders() -> None:
    model = cnn()
    ghosts = ghost_bn(model, size=2, layers="5")
    with pytest.raises(ValueError, match=r"'5' cannot have SyncBN, because it has Ghost BN.*undo"):
        sync_bn(model)
    ghosts.undo()
    with synced(model), pytest.raises(ValueError, match=r"'1' cannot have Ghost BN, because it has SyncBN.*undo"):
        ghost_bn(model, size=2)
    with ghost_bn(model, size=2, layers="5"), pytest.warns(UserWarning, match="one process"):  # a model may have both
        sync_bn(model, layers="1")


def test_a_forward_set_on_the_instance_is_refused_by_name() -> None:
    model = cnn()
    model[5].forward = F.relu
    with pytest.raises(ValueError, match="'5' has a forward set on the instance"):
        sync_bn(model)


# --- what is computed, all of it on one rank --------------------------------------------------------------------------

IN_TORCHS_OWN_WAY = [name for name in CASES if "SyncBatchNorm" not in name and "one value" not in name]


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


@pytest.mark.parametrize("name", IN_TORCHS_OWN_WAY)
def test_over_one_rank_every_kind_of_layer_computes_what_it_does_without(one_rank: None, name: str) -> None:
    model, batches = case(name)
    model, batches = model.double(), [x.double() for x in batches]
    expected = outcome(copy.deepcopy(model), batches)
    with synced(model):
        found = outcome(model, batches)
    rounding = 1e-6 if "1e4" in name else 1e-10
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.bfloat16, torch.float16])  # float32: under autocast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32_and_rounded_once(
    one_rank: None, dtype: torch.dtype, layer_dtype: torch.dtype
) -> None:
    layer = nn.BatchNorm2d(3, momentum=1.0).to(layer_dtype)
    oracle = nn.BatchNorm2d(3, momentum=1.0).double()
    x = (torch.randn(64, 3, 8, 8) + 30).to(dtype).requires_grad_()
    dy = torch.randn(64, 3, 8, 8).to(dtype)
    with synced(layer):
        y = layer(x)
        y.backward(dy)
    x64 = x.detach().double().requires_grad_()
    expected = oracle(x64)
    expected.backward(dy.double())
    for ours, theirs in [
        (y, expected),
        (x.grad, x64.grad),
        (layer.weight.grad, oracle.weight.grad),
        (layer.bias.grad, oracle.bias.grad),
        (layer.running_mean, oracle.running_mean),
        (layer.running_var, oracle.running_var),
    ]:
        rounding = torch.finfo(ours.dtype).eps if ours.element_size() == 2 else 1e-5
        torch.testing.assert_close(ours.double(), theirs, rtol=rounding, atol=2e-5)
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, layer_dtype)


def test_gradients_agree_with_finite_differences(one_rank: None) -> None:
    for shape in ((5, 3), (4, 3, 2), (2, 3, 2, 2)):
        bn = nn.BatchNorm2d(3).double() if len(shape) == 4 else nn.BatchNorm1d(3).double()
        nn.init.uniform_(bn.weight)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        with synced(bn):
            assert torch.autograd.gradcheck(lambda x, *_, bn=bn: bn(x), (x, bn.weight, bn.bias))


@pytest.mark.parametrize("affine", ["weight and bias", "weight", ""])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (2, 3, 2, 2)])
def test_second_derivatives_agree_with_finite_differences(one_rank: None, shape: tuple[int, ...], affine: str) -> None:
    bn = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3, affine=bool(affine)).double()
    if affine == "weight":
        bn.bias = None
    for parameter in bn.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with synced(bn):
        assert torch.autograd.gradgradcheck(lambda x, *_: bn(x), (x, *bn.parameters()))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_gradients_to_be_differentiated_are_the_others_and_of_the_same_type(
    one_rank: None, dtype: torch.dtype, rounding: float
) -> None:
    bn, x = nn.BatchNorm2d(3).to(dtype), (torch.randn(8, 3, 4, 4) + 30).to(dtype).requires_grad_()
    inputs = [x, *bn.parameters()]
    with synced(bn):
        for create_graph in (True, False):
            grads = torch.autograd.grad(bn(x).pow(3).sum(), inputs, create_graph=create_graph)
            assert [g.dtype for g in grads] == [dtype] * 3
            if create_graph:
                first = grads
    for found, expected in zip(first, grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


def test_one_value_per_channel_in_all_is_refused_as_torch_does(one_rank: None) -> None:
    bn = nn.BatchNorm1d(3)
    before = copy.deepcopy(bn.state_dict())
    with synced(bn):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            bn(torch.randn(1, 3))
        bn(torch.randn(0, 3))
    assert torch.equal(bn.running_mean, before["running_mean"]) and torch.equal(bn.running_var, before["running_var"])


def test_in_eval_mode_the_layer_is_a_plain_one(one_rank: None) -> None:
    model, (x, *_) = case("ragged batches")
    expected = copy.deepcopy(model).eval()(x)
    with synced(model.eval()):
        assert torch.equal(model(x), expected)
    without_statistics = nn.BatchNorm2d(3, track_running_stats=False).eval()
    with synced(without_statistics):
        torch.testing.assert_close(without_statistics(x), nn.BatchNorm2d(3)(x))


@pytest.mark.parametrize("freeze_first", [True, False])
def test_frozen_layers_stay_frozen_in_either_order(one_rank: None, freeze_first: bool) -> None:
    model, (x, *_) = case("ragged batches")
    model[3].p = 0.0
    expected, before = copy.deepcopy(model).eval()(x), copy.deepcopy(model.state_dict())
    verbs: list[Callable[[nn.Module], Handle]] = [freeze_bn, synced]
    with verbs[not freeze_first](model), verbs[freeze_first](model):
        assert torch.equal(model(x), expected)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_keys_and_layers_stay_what_they_are_and_undo_leaves_nothing(one_rank: None) -> None:
    model = cnn()
    layers, keys, attributes = list(model.modules()), list(model.state_dict()), set(vars(model[1]))
    with synced(model):
        assert list(model.modules()) == layers and list(model.state_dict()) == keys
        assert "synced over 1 ranks" in repr(model)
        assert type(copy.deepcopy(model)[1]) is nn.BatchNorm2d
    assert type(model[1]) is nn.BatchNorm2d and set(vars(model[1])) == attributes


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_it_gives_what_it_gives_eagerly(one_rank: None, fullgraph: bool) -> None:
    """In train mode the graph breaks at the layer; in eval mode it does not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), timm.layers.BatchNormAct2d(4))
    model.train(not fullgraph)
    (x,) = images(4)
    eager = outcome(copy.deepcopy(model), [x, x])
    torch._dynamo.reset()
    with synced(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for ours, theirs in zip(outcome(compiled, [x, x]), eager, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class OwnMaths(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return (input - input.mean((0, 2, 3), keepdim=True)) * self.weight.view(1, -1, 1, 1)


def test_a_layer_that_calls_no_batch_norm_is_refused_by_name(one_rank: None) -> None:
    model = cnn(OwnMaths(8))
    with synced(model):
        with pytest.raises(TypeError, match="forward of layer '1' does not call"):
            model(*images(4))
        model.eval()(*images(4))
