"""FrozenBN is the constant affine map of the stored statistics, also in training, until its handle is undone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_bn import find_bn, freeze_bn
from tests.zoo import CASES, case, cnn, images


@pytest.mark.parametrize("name", CASES)
def test_training_mode_equals_eval_mode_bit_by_bit(name: str) -> None:
    model, batches = case(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    buffers = copy.deepcopy(dict(model.named_buffers()))
    expected = [copy.deepcopy(model).eval()(x) for x in batches]
    with freeze_bn(model, affine=True):
        for x, y in zip(batches, expected, strict=True):
            for mode in (True, False):
                assert torch.equal(model.train(mode)(x), y)
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers()), "num_batches_tracked included"


@pytest.mark.parametrize("mode", [True, False])
def test_a_mode_set_while_frozen_holds_after_thawing_and_an_exception_changes_none(mode: bool) -> None:
    model = cnn(dropout=0.0).train(not mode)
    with freeze_bn(model):
        model.train(mode)
        with pytest.raises(ValueError, match="expected 4D"):
            model[1](torch.randn(3))
        assert all(layer.training is mode for layer in find_bn(model).values())
    assert all(layer.training is mode for layer in find_bn(model).values())
    before = model[1].running_mean.clone()
    model(torch.randn(4, 3, 8, 8))
    assert torch.equal(before, model[1].running_mean) is not mode


def test_layers_are_frozen_until_the_last_handle_is_undone() -> None:
    model, (x,) = cnn(), images(8, mean=2)
    last = freeze_bn(model, layers="1")
    first = freeze_bn(model)
    before = model[1].running_mean.clone(), model[5].running_mean.clone()
    first.undo()
    model(x)
    assert torch.equal(before[0], model[1].running_mean) and not torch.equal(before[1], model[5].running_mean)
    model[1].running_mean.fill_(5)
    assert model[1](torch.full((3, 8, 2, 2), 5.0)).abs().max() < 1e-5, "statistics written while frozen are used"
    last.undo()
    model(x)
    assert not model[1].running_mean.eq(5).any()


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)])
@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_compiled_model_is_frozen_and_one_graph(layer: nn.Module, compiled_before: bool) -> None:
    model, (x,) = cnn(layer, dropout=0.0), images(4, mean=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    if compiled_before:
        compiled(x)
    expected = copy.deepcopy(model).eval()(x)
    with freeze_bn(model):
        torch.testing.assert_close(compiled(x), expected)
        compiled(x).sum().backward()
        assert model[1].training and model[1].weight.grad is not None
    before = model[1].running_mean.clone()
    compiled(x)
    assert not torch.equal(before, model[1].running_mean), "thawed"


def test_gradients_are_those_of_the_constant_affine_map() -> None:
    bn = case("float64 model")[0][1].train()
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    with freeze_bn(nn.Sequential(bn)):
        ours = torch.autograd.grad((bn(x) * upstream).sum(), (x, bn.weight, bn.bias))
        assert torch.autograd.gradcheck(bn, x[:2, :, :2, :2].detach().requires_grad_())
    mean, var, weight, bias = (
        v.detach().view(1, -1, 1, 1).requires_grad_() for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    y = (x - mean) / (var + bn.eps).sqrt() * weight + bias
    theirs = torch.autograd.grad((y * upstream).sum(), (x, weight, bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.view_as(a), rtol=1e-10, atol=1e-12)


OPTIMIZERS: dict[str, Callable[[Any], list[torch.optim.Optimizer]]] = {
    "SGD with momentum": lambda m: [SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)],
    "AdamW with decay": lambda m: [AdamW(m.parameters(), lr=0.1, weight_decay=0.5)],
    "AdamW, fused": lambda m: [AdamW(m.parameters(), lr=0.1, weight_decay=0.5, fused=True)],
    "two optimizers": lambda m: [
        SGD([p for p in m.parameters() if p.ndim == 1], lr=0.1),
        AdamW([p for p in m.parameters() if p.ndim > 1], lr=0.1),
    ],
    "one parameter in two optimizers": lambda m: [
        SGD(m.parameters(), lr=0.1), SGD(m[1].parameters(), lr=0.1, momentum=0.9),
    ],
}  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, how: str) -> None:
    x = torch.randn(8, 3, 8, 8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean() + sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    if how == "gradients":
        closure()
        optimizer.step()
    else:
        assert (optimizer.step(closure) if how == "a closure" else optimizer.step(closure=closure)).isfinite()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "gradients") for name in OPTIMIZERS),
        ("AdamW with decay", "a closure"),
        ("SGD with momentum", "a closure by name"),
    ],
)
def test_affine_parameters_do_not_move_and_all_others_do(name: str, how: str) -> None:
    model, hooks = case("ragged batches")[0], len(_global_optimizer_pre_hooks)
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
    assert len(_global_optimizer_pre_hooks) == hooks
    for optimizer in optimizers:
        step(model, optimizer, how)
    assert not any(torch.equal(value, before[key]) for key, value in model.named_parameters()), "thawed"


def test_a_parameter_shared_with_another_layer_is_frozen_with_it_and_another_models_is_not() -> None:
    model, other = (nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)) for _ in range(2))
    x = torch.randn(8, 3)
    model[1].weight = model[0].weight
    before = model[0].weight.clone()
    with freeze_bn(model, layers="0", affine=True):
        for module in (model, other):
            module(x).pow(3).sum().backward()
            SGD(module.parameters(), lr=0.1).step()
    assert torch.equal(model[1].weight, before) and not torch.equal(model[1].bias, torch.zeros(3))
    assert other[0].bias.abs().max() > 0 and other[0].bias.grad is not None


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
