"""PreciseBN leaves no trace but running statistics, touches no frozen layer, and has no defect of the other tools."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_bn import find_bn, freeze_bn, precise_bn
from lightning_bn.functional.precise import call_model
from tests.truth import assert_close_to, in_double
from tests.zoo import CASES, case, cnn, images

one_pass = partial(precise_bn, normalization_batch_size="loader")


def ragged() -> tuple[Any, list[Tensor]]:
    return case("ragged batches")


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that a pass has no business with, objects by identity."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    found["random"] = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    for name, module in model.named_modules():
        found[name] = (
            type(module),
            {k: v for k, v in vars(module).items() if not k.startswith("_")},
            sorted(vars(module)),
            {k: id(v) for k, v in (*module._parameters.items(), *module._buffers.items(), *module._modules.items())},
            [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
            module.extra_repr(),
        )
    for name, value in model.state_dict().items():
        if not name.endswith(("running_mean", "running_var")):
            found[f"value of {name}"] = value.double().numpy().tobytes()
    return found


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in CASES), ("ragged batches", False), ("timm BatchNormAct2d", False)]
)
def test_a_pass_leaves_no_trace_but_the_running_statistics(name: str, training: bool) -> None:
    model, batches = case(name)
    model.train(training)
    before = traces(model)
    assert set(one_pass(model, batches)) == set(find_bn(model))
    assert traces(model) == before, "dropout is off, and nothing else draws"


@pytest.mark.parametrize(
    ("where", "error"),
    [
        *((where, error) for where in ("forward", "batches") for error in (ZeroDivisionError, KeyboardInterrupt)),
        *(("batches", GeneratorExit), ("a layer", ValueError)),
    ],
)
def test_a_pass_that_is_interrupted_leaves_nothing_at_all_and_can_be_repeated(where: str, error: Any) -> None:
    model, data = ragged()
    model[3].eval()
    before, values, truth = traces(model), copy.deepcopy(model.state_dict()), in_double(model, data)

    def batches() -> Iterator[Tensor]:
        for i, batch in enumerate(data):
            if where == "batches" and i == 2:
                raise error
            yield batch

    def forward(model: Any, batch: Tensor) -> None:
        model(batch)
        if where == "forward" and len(batch) == 3:
            raise error
        if where == "a layer":  # while modes, momentum and buffers are those of the pass
            model[1](model[0](batch)[0])

    with pytest.raises(error):
        one_pass(model, batches(), forward=forward)
    assert traces(model) == before
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert_close_to(one_pass(model, data), truth, sigma=2e-5, var=1e-4)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_pass_keeps_no_graph_and_makes_no_inference_tensor(mode: Callable[[], Any]) -> None:
    """Everything but BatchNorm is in eval mode during it."""
    model, batches = ragged()
    outputs, modes = [], []

    def forward(model: nn.Module, x: Tensor) -> None:
        outputs.append(model(x))
        modes.append([m for m in model.modules() if m.training])

    with mode():
        statistics = one_pass(model, batches, forward=forward)
    assert modes == [list(find_bn(model).values())] * len(batches) and model.training
    assert not any(y.requires_grad for y in outputs)
    assert not any(tensor.is_inference() for tensor in (*model.buffers(), statistics["1"].mean, statistics["1"].var))
    model(batches[0]).sum().backward()  # the next fit goes on


def test_a_forward_with_gradients_of_its_own_may_use_them() -> None:
    """A gradient penalty in the training step, say."""
    model, batches = ragged()

    @torch.enable_grad()
    def forward(model: nn.Module, x: Tensor) -> None:
        x = x.requires_grad_()
        assert torch.autograd.grad(model(x).square().sum(), x)[0].isfinite().all()

    statistics = one_pass(model, [x.clone() for x in batches], forward=forward)
    for layer, measured in one_pass(model, batches).items():
        assert not statistics[layer].mean.requires_grad and not statistics[layer].var.requires_grad
        torch.testing.assert_close(statistics[layer].mean, measured.mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "freeze",
    [
        lambda model: model[1].eval(),
        lambda model: freeze_bn(model, layers="1"),
        lambda model: BaseFinetuning.freeze(model[1], train_bn=False),
    ],
)
def test_frozen_layers_keep_and_use_their_statistics(freeze: Callable[[Any], None]) -> None:
    model, batches = ragged()
    oracle = copy.deepcopy(model).double().eval()
    freeze(model)
    before = copy.deepcopy(model[1].state_dict())
    statistics = one_pass(model, batches)
    assert all(torch.equal(before[key], value) for key, value in model[1].state_dict().items())
    with torch.no_grad():
        seen = torch.cat([oracle[:5](x.double()) for x in batches]).movedim(1, -1).reshape(-1, 6)
    assert_close_to(statistics, {"5": seen}, sigma=2e-5, var=1e-4)
    with freeze_bn(model), pytest.raises(ValueError, match="All chosen BatchNorm layers are frozen"):
        one_pass(model, batches)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_in_the_middle_of_a_pass_the_model_and_a_copy_are_plain(copied: Callable[[nn.Module], Any]) -> None:
    model, batches = ragged()
    before, values = copy.deepcopy(model).eval(), copy.deepcopy(model.state_dict())
    layers, tensors, copies = list(model.modules()), list(map(id, (*model.parameters(), *model.buffers()))), []

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        copies.append(copied(model))
        now = model.state_dict()
        assert list(now) == list(values)
        assert all(torch.equal(values[key], value) for key, value in now.items())
        cnn().load_state_dict(now, strict=True)
        assert list(model.modules()) == layers
        assert list(map(id, (*model.parameters(), *model.buffers()))) == tensors
        assert all(isinstance(layer, nn.BatchNorm2d) for layer in find_bn(model).values())

    one_pass(model, batches, forward=forward)
    for plain in copies:
        assert type(plain[1]) is nn.BatchNorm2d and not hasattr(plain[1], "_behaviors")
        torch.testing.assert_close(plain.eval()(batches[0]), before(batches[0]), rtol=0, atol=0)
        assert plain[1].train()(torch.randn(4, 8, 2, 2)).shape == (4, 8, 2, 2)
        assert plain[1].num_batches_tracked == before[1].num_batches_tracked + 1


GONE = "the other tool no longer has the defect"


def rows(channels: int = 1, layers: int = 1) -> nn.Sequential:
    return nn.Sequential(*(nn.BatchNorm1d(channels) for _ in range(layers)))


def test_ragged_batches_and_population_variance_agree_with_fvcore() -> None:
    model, batches = case("ragged batches")
    theirs = copy.deepcopy(model)
    theirs[3].eval()  # their caller's business
    update_bn_stats(theirs, batches, num_iters=len(batches))
    before = {name: (buffer, buffer.data_ptr()) for name, buffer in model.named_buffers()}
    one_pass(model, batches)
    for ours, other in ((model[1], theirs[1]), (model[5], theirs[5])):
        torch.testing.assert_close(ours.running_mean, other.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_var, other.running_var, rtol=1e-4, atol=0)
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0] and buffer.data_ptr() == before[name][1], "written in place"


def test_an_exception_leaves_neither_momentum_nor_hooks_behind() -> None:
    def broken() -> Iterator[Tensor]:
        yield from images(4)
        raise OSError

    fvcores, torchs, ours = cnn(), cnn(), cnn()
    for run in (lambda: update_bn_stats(fvcores, broken(), 2), lambda: update_bn(broken(), torchs)):
        with pytest.raises(OSError):
            run()
    with pytest.raises(OSError):
        one_pass(ours, broken())
    assert fvcores[1].momentum == 1 and fvcores[1]._forward_pre_hooks, GONE
    assert torchs[1].momentum is None, GONE
    assert ours[1].momentum == 0.1 and not ours[1]._forward_pre_hooks


def fvcore(model: nn.Module, batches: list[Tensor]) -> None:
    update_bn_stats(model, batches, num_iters=len(batches))


def swa_utils(model: nn.Module, batches: list[Tensor]) -> None:
    update_bn(batches, model)


def partly_frozen() -> nn.Sequential:
    model = rows(2, layers=2)
    model[0].eval()
    model[0].running_mean.fill_(1)
    return model


DEFECTS: dict[str, tuple[Any, Any, Any, list[Tensor], Any, Any]] = {
    "zeroes a layer that is not used": (
        fvcore, lambda: rows(3, layers=2), lambda m, x: m[0](x), [torch.randn(8, 3)],
        lambda m: m[1].running_var.eq(0).all(),
        lambda m: m[1].running_var.eq(1).all() and m[1].running_mean.eq(0).all(),
    ),
    "takes E[x^2] - E[x]^2, which has produced variances of -8": (
        fvcore, lambda: rows(4), call_model, [torch.arange(256.0).sin().view(64, 4) + 1e4 for _ in range(20)],
        lambda m: (m[0].running_var - 0.5).abs().max() > 0.4,
        lambda m: (m[0].running_var - 0.5).abs().max() < 0.05,
    ),
    "weighs all batches alike": (
        swa_utils, rows, call_model, [torch.zeros(9, 1), torch.ones(3, 1)],
        lambda m: m[0].running_mean.item() == pytest.approx(0.5),
        lambda m: m[0].running_mean.item() == pytest.approx(0.25),
    ),
    "leaves dropout on, which doubles the second moment behind it": (
        swa_utils, lambda: nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)), call_model, [torch.randn(2000, 1) + 3],
        lambda m: m[1].running_var.item() > 5,
        lambda m: m[1].running_var.item() == pytest.approx(1, rel=0.1),
    ),
    "overwrites frozen statistics": (
        swa_utils, partly_frozen, call_model, [torch.randn(50, 2) + 3],
        lambda m: not m[0].running_mean.eq(1).any(),
        lambda m: m[0].running_mean.eq(1).all(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_of_another_tool_is_not_ours(name: str) -> None:
    tool, make, forward, batches, has_it, is_right = DEFECTS[name]
    ours, theirs = make(), make()
    theirs.forward = partial(forward, theirs) if forward is not call_model else theirs.forward
    tool(theirs, batches)
    one_pass(ours, batches, forward=forward)
    assert has_it(theirs), GONE
    assert is_right(ours)
