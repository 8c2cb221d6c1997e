"""PreciseBN leaves no trace but running statistics, however a pass ends, and touches no layer that is frozen."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from lightning_bn import find_bn, freeze_bn, precise_bn
from tests.truth import assert_close_to, in_double
from tests.zoo import CASES, case, cnn


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a pass has no business with, objects by identity."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        found[name] = (
            type(module),
            attributes,
            sorted(vars(module)),
            {k: id(v) for k, v in (*module._parameters.items(), *module._buffers.items(), *module._modules.items())},
            [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
            module.extra_repr(),
        )
    for name, value in model.state_dict().items():
        if not name.endswith(("running_mean", "running_var")):
            found[f"value of {name}"] = value.double().numpy().tobytes()
    return found


def random_streams() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


class Trouble(Exception):
    pass


def trouble_in_forward(error: type[BaseException]) -> tuple[Callable[[nn.Module, Any], Any], Callable[..., Any]]:
    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        if len(batch) == 3:
            raise error

    return forward, iter


def trouble_in_batches(error: type[BaseException]) -> tuple[None, Callable[[list[Tensor]], Iterator[Tensor]]]:
    def batches(data: list[Tensor]) -> Iterator[Tensor]:
        yield from data[:2]
        raise error

    return None, batches


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_leaves_no_trace_but_the_running_statistics(name: str, training: bool) -> None:
    model, batches = case(name)
    model.train(training)
    before, streams = traces(model), random_streams()
    precise_bn(model, batches, normalization_batch_size="loader")
    assert traces(model) == before
    assert random_streams() == streams, "dropout is off, and nothing else draws"


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", [trouble_in_forward, trouble_in_batches])
def test_a_pass_that_is_interrupted_leaves_nothing_at_all(
    where: Callable[..., Any], error: type[BaseException]
) -> None:
    model, data = case("ragged batches")
    model[3].eval()
    before, values = traces(model), copy.deepcopy(model.state_dict())
    forward, batches = where(error)
    with pytest.raises(error):
        precise_bn(model, batches(data), forward=forward, normalization_batch_size="loader")
    assert traces(model) == before
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())


def test_an_exception_inside_a_layer_leaves_nothing_at_all() -> None:
    """Where modes, momentum and buffers are lent at that very moment."""
    model, (batch, *_) = case("ragged batches")
    before, values = traces(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected 4D"):
        precise_bn(model, [batch, batch], forward=lambda m, x: m[1](m[0](x)[0]), normalization_batch_size="loader")
    assert traces(model) == before
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())


def test_a_pass_without_success_can_be_repeated_with_it() -> None:
    model, data = case("ragged batches")
    truth = in_double(model, data)
    with pytest.raises(Trouble):
        precise_bn(model, trouble_in_batches(Trouble)[1](data), normalization_batch_size="loader")
    assert_close_to(precise_bn(model, data, normalization_batch_size="loader"), truth, sigma=2e-5, var=1e-4)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_pass_keeps_no_graph_and_makes_no_inference_tensor(mode: Callable[[], Any]) -> None:
    model, batches = case("ragged batches")
    outputs = []
    with mode():
        statistics = precise_bn(
            model, batches, forward=lambda m, x: outputs.append(m(x)), normalization_batch_size="loader"
        )
    assert not any(y.requires_grad for y in outputs)
    assert not any(tensor.is_inference() for tensor in (*model.buffers(), statistics["1"].mean, statistics["1"].var))
    model.train()(batches[0]).sum().backward()  # the next fit goes on


@pytest.mark.parametrize("name", ["ragged batches", "channels_last, mean 1e4 std 1", "bf16 model"])
def test_a_forward_with_gradients_of_its_own_may_use_them(name: str) -> None:
    """A gradient penalty in the training step, say."""
    model, batches = case(name)

    @torch.enable_grad()
    def forward(model: nn.Module, x: Tensor) -> None:
        x = x.requires_grad_()
        assert torch.autograd.grad(model(x).float().square().sum(), x)[0].isfinite().all()

    statistics = precise_bn(model, [x.clone() for x in batches], forward=forward, normalization_batch_size="loader")
    again = precise_bn(model, batches, normalization_batch_size="loader")
    for layer, measured in statistics.items():
        assert not measured.mean.requires_grad and not measured.var.requires_grad
        torch.testing.assert_close(measured.mean, again[layer].mean, rtol=1e-5, atol=1e-5)


# --- modes ------------------------------------------------------------------------------------------------------------


def test_everything_but_batchnorm_is_in_eval_mode_during_a_pass() -> None:
    model, batches = case("ragged batches")
    modes = []
    precise_bn(
        model,
        batches,
        forward=lambda m, x: (m(x), modes.append([k for k in m.modules() if k.training])),
        normalization_batch_size="loader",
    )
    assert modes == [list(find_bn(model).values())] * len(batches)
    assert model.training


def frozen_by_user(model: nn.Sequential) -> None:
    model[1].eval()


def frozen_by_freeze_bn(model: nn.Sequential) -> None:
    freeze_bn(model, layers="1")


def frozen_by_base_finetuning(model: nn.Sequential) -> None:
    BaseFinetuning.freeze(model[1], train_bn=False)


@pytest.mark.parametrize("freeze", [frozen_by_user, frozen_by_freeze_bn, frozen_by_base_finetuning])
def test_frozen_layers_keep_and_use_their_statistics(freeze: Callable[[nn.Sequential], None]) -> None:
    model, batches = case("ragged batches")
    oracle = copy.deepcopy(model).double().eval()
    freeze(model)
    before = copy.deepcopy(model[1].state_dict())
    statistics = precise_bn(model, batches, normalization_batch_size="loader")
    assert list(statistics) == ["5"]
    assert all(torch.equal(before[key], value) for key, value in model[1].state_dict().items())
    with torch.no_grad():
        seen = torch.cat([oracle[:5](x.double()) for x in batches]).movedim(1, -1).reshape(-1, 6)
    assert_close_to(statistics, {"5": seen}, sigma=2e-5, var=1e-4)


def test_in_an_eval_mode_model_every_layer_is_estimated() -> None:
    model, batches = case("ragged batches")
    assert list(precise_bn(model.eval(), batches, normalization_batch_size="loader")) == ["1", "5"]


def test_a_model_with_nothing_but_frozen_layers_is_refused() -> None:
    model, batches = case("ragged batches")
    with freeze_bn(model), pytest.raises(ValueError, match="All chosen BatchNorm layers are frozen"):
        precise_bn(model, batches, normalization_batch_size="loader")


# --- inside a pass ----------------------------------------------------------------------------------------------------


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save])
def test_a_copy_made_in_the_middle_of_a_pass_is_the_plain_model(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, batches = case("ragged batches")
    before = copy.deepcopy(model).eval()
    copies = []
    precise_bn(model, batches, forward=lambda m, x: (m(x), copies.append(copied(m))), normalization_batch_size="loader")
    for plain in copies:
        assert type(plain[1]) is nn.BatchNorm2d and not hasattr(plain[1], "_behaviors")
        torch.testing.assert_close(plain.eval()(batches[0]), before(batches[0]), rtol=0, atol=0)
        assert plain[1].train()(torch.randn(4, 8, 2, 2)).shape == (4, 8, 2, 2)
        assert plain[1].num_batches_tracked == before[1].num_batches_tracked + 1


def test_state_dict_keys_and_values_are_the_plain_models_in_the_middle_of_a_pass() -> None:
    model, batches = case("ragged batches")
    before = copy.deepcopy(model.state_dict())

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        now = model.state_dict()
        assert list(now) == list(before)
        assert all(torch.equal(before[key], value) for key, value in now.items())
        cnn().load_state_dict(now, strict=True)

    precise_bn(model, batches, forward=forward, normalization_batch_size="loader")


def test_identity_of_layers_and_parameters_holds_in_the_middle_of_a_pass() -> None:
    model, batches = case("ragged batches")
    layers, tensors = list(model.modules()), list(map(id, (*model.parameters(), *model.buffers())))

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        assert list(model.modules()) == layers
        assert list(map(id, (*model.parameters(), *model.buffers()))) == tensors
        assert all(isinstance(layer, nn.BatchNorm2d) for layer in find_bn(model).values())

    precise_bn(model, batches, forward=forward, normalization_batch_size="loader")


def test_weights_are_trained_bit_by_bit_as_without_passes() -> None:
    model, batches = case("ragged batches")
    twin = copy.deepcopy(model)
    weights = []
    for m, with_pass in ((model, True), (twin, False)):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for batch in batches[:3]:
            optimizer.zero_grad()
            m(batch).square().sum().backward()
            if with_pass:
                precise_bn(m, [x.clone() for x in batches], normalization_batch_size="loader")
            optimizer.step()
        weights.append([p.detach().clone() for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
