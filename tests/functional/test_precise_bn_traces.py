"""PreciseBN leaves no trace but running statistics, touches no frozen layer, and has no defect of the other tools."""

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

from lightning_bn import find_bn, freeze_bn, precise_bn
from tests.truth import assert_close_to, in_double
from tests.zoo import CASES, case, cnn

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
