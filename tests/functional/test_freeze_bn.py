"""FrozenBN is the constant affine map of the stored statistics, also in training, until its handle is undone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_bn import find_bn, freeze_bn
from tests.zoo import CASES, Shared, case, cnn, images

WITHOUT_DROPOUT = [name for name in CASES if "timm" not in name]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def constant_affine(x: Tensor, bn: Any, weight: Tensor, bias: Tensor) -> Tensor:
    """The paper's FrozenBN."""
    mean, var = (v.detach().reshape(1, -1, 1, 1) for v in (bn.running_mean, bn.running_var))
    return (x - mean) / (var + bn.eps).sqrt() * weight.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


# --- the forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_training_mode_equals_eval_mode_bit_by_bit(name: str) -> None:
    model, batches = case(name)
    without_dropout(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    expected = [copy.deepcopy(model).eval()(x) for x in batches]
    with freeze_bn(model):
        for x, y in zip(batches, expected, strict=True):
            for mode in (True, False, True):
                assert torch.equal(model.train(mode)(x), y)
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers()), "num_batches_tracked included"


def test_timms_layers_keep_their_activation() -> None:
    model, (x, *_) = case("timm BatchNormAct2d")
    layer = next(layer for layer in find_bn(model).values() if type(layer.act) is nn.ReLU)
    plain = copy.deepcopy(layer).eval()
    x = torch.randn(4, layer.num_features, 5, 5)
    with freeze_bn(model):
        assert torch.equal(layer(x), plain(x)) and layer(x).min() == 0
    assert type(layer) is type(plain)


@pytest.mark.parametrize("mode", [True, False])
def test_a_mode_set_while_frozen_holds_after_thawing(mode: bool) -> None:
    model = cnn().train(not mode)
    with freeze_bn(model):
        model.train(mode)
        assert all(layer.training is mode for layer in find_bn(model).values())
    assert all(layer.training is mode for layer in find_bn(model).values())
    before = model[1].running_mean.clone()
    model(torch.randn(4, 3, 8, 8))
    assert torch.equal(before, model[1].running_mean) is not mode


def test_an_exception_in_a_forward_leaves_the_mode_as_it_was() -> None:
    model = cnn().train()
    with freeze_bn(model):
        with pytest.raises(ValueError, match="expected 4D"):
            model[1](torch.randn(3))
        assert model[1].training


def test_a_layer_called_several_times_is_frozen_in_every_call() -> None:
    model = Shared()
    x = images(4)[0]
    expected = copy.deepcopy(model).eval()(x)
    with freeze_bn(model):
        assert torch.equal(model.train()(x), expected)


def test_statistics_written_while_frozen_are_used() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    with freeze_bn(model):
        model[0].running_mean.fill_(5)
        assert model(torch.full((3, 2), 5.0)).abs().max() < 1e-5


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_handles_may_be_undone_in_any_order(order: tuple[int, int]) -> None:
    model = cnn().train()
    handles = freeze_bn(model), freeze_bn(model, layers="1")
    x = images(8, mean=2)[0]
    before = model[1].running_mean.clone(), model[5].running_mean.clone()
    handles[order[0]].undo()
    model(x)
    assert torch.equal(before[0], model[1].running_mean), "still frozen by the other handle"
    assert torch.equal(before[1], model[5].running_mean) is (order[0] == 1)
    handles[order[1]].undo()
    model(x)
    assert not torch.equal(before[0], model[1].running_mean)
    assert type(model[1]) is type(model[5]) is nn.BatchNorm2d


def test_only_the_chosen_layers_are_frozen() -> None:
    model = cnn().train()
    before = copy.deepcopy(model.state_dict())
    with freeze_bn(model, layers=["5"]):
        model(images(8, mean=2)[0])
    after = model.state_dict()
    assert torch.equal(before["5.running_mean"], after["5.running_mean"])
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])


def test_layers_without_statistics_are_refused_by_name_or_left_out() -> None:
    model = cnn(nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(ValueError, match="1: track_running_stats=False, so there are no population statistics"):
        freeze_bn(model, layers=["1", "5"])
    with freeze_bn(model):
        assert type(model[1]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match=r"layers='x' matches no BatchNorm layer.*There are: 1, 5"):
        freeze_bn(model, layers="x")


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)])
def test_a_frozen_model_compiles_to_one_graph(layer: nn.Module) -> None:
    model, x = without_dropout(cnn(layer)), images(4)[0]
    expected = copy.deepcopy(model).eval()(x)
    with freeze_bn(model):
        compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        compiled(x).sum().backward()
        assert model[1].training and model[1].weight.grad is not None


def test_a_model_compiled_before_it_is_frozen_is_frozen() -> None:
    model, x = without_dropout(cnn()), images(4, mean=3)[0]
    compiled = torch.compile(model.train(), backend="eager")
    compiled(x)
    expected = copy.deepcopy(model).eval()(x)
    with freeze_bn(model):
        torch.testing.assert_close(compiled(x), expected)
    before = model[1].running_mean.clone()
    compiled(x)
    assert not torch.equal(before, model[1].running_mean), "thawed"


# --- copies -----------------------------------------------------------------------------------------------------------


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save])
def test_copies_of_a_frozen_model_are_plain(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = cnn().train()
    with freeze_bn(model, affine=True):
        plain = copied(model)
    assert type(plain[1]) is nn.BatchNorm2d
    before = plain[1].running_mean.clone()
    plain(images(4, mean=2)[0])
    assert not torch.equal(before, plain[1].running_mean)


def test_the_state_dict_of_a_frozen_model_is_the_plain_one() -> None:
    model = cnn()
    keys, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    with freeze_bn(model, affine=True):
        assert list(model.state_dict()) == keys and list(map(id, model.parameters())) == parameters
        cnn().load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(cnn().state_dict(), strict=True)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_constant_affine_map() -> None:
    bn = case("float64 model")[0][1].train()
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in (bn.weight, bn.bias))
    upstream = torch.randn_like(x)
    with freeze_bn(nn.Sequential(bn)):
        ours = torch.autograd.grad((bn(x) * upstream).sum(), (x, bn.weight, bn.bias))
        assert torch.autograd.gradcheck(bn, x[:2, :, :2, :2].detach().requires_grad_())
    theirs = torch.autograd.grad((constant_affine(x, bn, weight, bias) * upstream).sum(), (x, weight, bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- affine=True ------------------------------------------------------------------------------------------------------

Optimizers = Callable[[nn.Module], list[torch.optim.Optimizer]]

OPTIMIZERS: dict[str, Optimizers] = {
    "SGD with momentum": lambda m: [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)],
    "AdamW with decay": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5)],
    "AdamW, fused": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5, fused=True)],
    "two optimizers": lambda m: [
        torch.optim.SGD([p for p in m.parameters() if p.ndim == 1], lr=0.1),
        torch.optim.AdamW([p for p in m.parameters() if p.ndim > 1], lr=0.1),
    ],
    "one parameter in two optimizers": lambda m: [
        torch.optim.SGD(m.parameters(), lr=0.1),
        torch.optim.SGD(m[1].parameters(), lr=0.1, momentum=0.9),
    ],
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, how: str) -> None:
    x = torch.randn(8, 3, 8, 8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean() + sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    if how == "a closure":
        assert optimizer.step(closure).isfinite()
    elif how == "a closure by name":
        optimizer.step(closure=closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "gradients") for name in OPTIMIZERS),
        ("AdamW with decay", "a closure"),
        ("SGD with momentum", "a closure by name"),
    ],
)
def test_affine_parameters_do_not_move_and_all_others_do(name: str, how: str) -> None:
    model, _ = case("ragged batches")
    optimizers = OPTIMIZERS[name](model)
    for optimizer in optimizers:
        step(model, optimizer, how)  # its momentum must not move them later
    frozen = {f"{i}.{p}" for i in (1, 5) for p in ("weight", "bias")}
    before = copy.deepcopy(dict(model.named_parameters()))
    with freeze_bn(model, affine=True):
        for optimizer in optimizers * 2:
            step(model, optimizer, how)
        assert all(p.requires_grad for p in model.parameters())
        for key, value in model.named_parameters():
            assert torch.equal(value, before[key]) is (key in frozen), key
    for optimizer in optimizers:
        step(model, optimizer, how)
    assert not any(torch.equal(value, before[key]) for key, value in model.named_parameters()), "thawed"


def test_a_parameter_shared_with_another_layer_is_frozen_with_it() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.clone()
    with freeze_bn(model, layers="0", affine=True):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[1].weight, before) and not torch.equal(model[1].bias, torch.zeros(3))


def test_another_models_optimizer_is_not_affected() -> None:
    model, other = cnn(), nn.Sequential(nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with freeze_bn(model, affine=True):
        other(torch.randn(8, 3)).pow(3).sum().backward()
        optimizer.step()
    assert other[0].bias.abs().max() > 0 and other[0].bias.grad is not None


def test_layers_without_weight_or_bias_can_be_frozen_too() -> None:
    for name in ("no affine", "no bias"):
        model, batches = case(name)
        with freeze_bn(model, affine=True):
            model(batches[0]).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_lbfgs_is_refused_only_with_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with freeze_bn(model, affine=True):
        with pytest.raises(TypeError, match="LBFGS"):
            torch.optim.LBFGS(model.parameters()).step(lambda: model(torch.randn(4, 2)).sum())
        optimizer = torch.optim.LBFGS(model[0].parameters(), max_iter=2)
        before = model[0].weight.clone()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.eye(2)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert not torch.equal(before, model[0].weight)


def test_undo_removes_the_optimizer_hook() -> None:
    before = len(_global_optimizer_pre_hooks)
    handle = freeze_bn(cnn(), affine=True)
    assert len(_global_optimizer_pre_hooks) == before + 1
    handle.undo()
    handle.undo()
    assert len(_global_optimizer_pre_hooks) == before
