"""adapt_bn stores the target's statistics, mixed with a prior as stated, and puts the original bits back."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import adapt_bn, find_bn, freeze_bn
from lightning_bn.functional.adapt import Adapting
from lightning_bn.layers.behavior import Handle
from tests.truth import in_double, recorded, rows_of
from tests.zoo import CASES, Shared, case, cnn, images, trained


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: buffer.clone() for key, buffer in model.named_buffers()}


def assert_same(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


@pytest.mark.parametrize(("prior", "share"), [(0, 0.0), (57, 0.75)])
def test_stored_statistics_are_the_mixture_of_the_targets_and_the_original_ones(prior: int, share: float) -> None:
    model, target = trained(cnn()), images(8, 8, 3, mean=2)
    truth, before = in_double(model, target), buffers_of(model)
    handle = adapt_bn(model, target, prior_samples=prior)
    for name, rows in truth.items():
        layer = model.get_submodule(name)
        for key, exact in (("running_mean", rows.mean(0)), ("running_var", rows.var(0, correction=0))):
            expected = share * before[f"{name}.{key}"].double() + (1 - share) * exact
            torch.testing.assert_close(getattr(layer, key).double(), expected, rtol=1e-4, atol=1e-5)
    assert handle.statistics.num_samples == 19
    handle.undo()
    assert_same(model, before)
    model[1].running_mean.fill_(5)
    handle.undo()
    assert model[1].running_mean.eq(5).all(), "the original statistics come back once"


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_gets_its_bits_back_after_an_exception_too(name: str) -> None:
    model, batches = case(name)
    before, objects = buffers_of(model), [id(b) for b in model.buffers()]
    modules = [(type(m), m.training) for m in model.modules()]
    with pytest.raises(KeyboardInterrupt), adapt_bn(model, batches, prior_samples=3) as handle:
        assert handle.statistics and not all(torch.equal(before[k], v) for k, v in model.named_buffers())
        raise KeyboardInterrupt
    assert_same(model, before)
    assert objects == [id(b) for b in model.buffers()]
    assert modules == [(type(m), m.training) for m in model.modules()]


@pytest.mark.parametrize("batches", [[], [torch.full((2, 3, 8, 8), torch.nan)]])
def test_a_failed_measurement_changes_nothing(batches: list[Tensor]) -> None:
    model = trained(cnn())
    before = buffers_of(model)
    with pytest.raises(ValueError, match=r"No batch reached|non-finite"):
        adapt_bn(model, batches)
    assert_same(model, before)
    assert type(model[1]) is nn.BatchNorm2d


def test_it_survives_inference_mode_and_a_change_of_dtype_and_the_model_trains_on_afterwards() -> None:
    model = trained(cnn())
    before = buffers_of(model)
    with torch.inference_mode():
        handle = adapt_bn(model, images(8))
        model.eval()(images(4)[0])
    model.double()
    handle.undo()
    assert_same(model.float(), before)
    model.train()(images(8)[0]).sum().backward()
    assert not any(buffer.is_inference() for buffer in model.buffers())


def test_only_chosen_layers_adapt_and_frozen_ones_do_not_and_num_samples_counts() -> None:
    model = trained(cnn())
    before = buffers_of(model)
    with adapt_bn(model, images(8, 8, 8), layers="5", num_samples=9) as handle:
        assert list(handle.statistics) == ["5"] and handle.statistics.num_samples == 16
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
        assert "adapted" in repr(model[5]) and "adapted" not in repr(model[1])
    with freeze_bn(model, layers="1"), adapt_bn(model, images(8)) as handle:
        assert list(handle.statistics) == ["5"]
    with freeze_bn(model), pytest.raises(ValueError, match="are frozen"):
        adapt_bn(model, images(8))
    assert_same(model, before)


def adapting(model: nn.Module, batches: list[Tensor], prior: int, run: Any = None) -> list[Any]:
    behavior, found = Adapting(find_bn(model), prior), []
    with Handle(find_bn(model).values(), behavior), torch.no_grad():
        for batch in batches:
            behavior.samples += len(batch)
            with recorded(model) if run is None else nullcontext() as calls:
                output = (run or model)(batch)
            found.append((calls, output))
    return found


@pytest.mark.parametrize(("make", "prior"), [(cnn, 0), (cnn, 10), (Shared, 10)])
def test_each_batch_is_normalized_with_all_that_came_so_far(make: Any, prior: int) -> None:
    model, batches = trained(make()).eval(), images(8, 3, 5, mean=1)
    before, samples = buffers_of(model), 0
    rows: dict[str, list[Tensor]] = {}
    for batch, (calls, _) in zip(batches, adapting(model, batches, prior), strict=True):
        samples += len(batch)
        share = prior / (prior + samples)
        for name, own in calls.items():
            layer = model.get_submodule(name)
            for x, y in own:
                rows.setdefault(name, []).append(rows_of(x))
                seen = torch.cat(rows[name])
                mean = share * layer.running_mean + (1 - share) * seen.mean(0)
                var = share * layer.running_var + (1 - share) * seen.var(0, correction=0)
                normal = (rows_of(x) - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias
                torch.testing.assert_close(rows_of(y), normal, rtol=1e-3, atol=1e-4)
    assert_same(model, before)


def test_a_compiled_model_adapts_as_well() -> None:
    model = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
    batches, compiled = images(4, 3), torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(batches[0])
        eager, ours = (adapting(model, batches, 4, run) for run in (None, compiled))
        with adapt_bn(model, batches):
            torch.testing.assert_close(compiled(batches[0]), model(batches[0]))
    for (_, expected), (_, output) in zip(eager, ours, strict=True):
        torch.testing.assert_close(output, expected)


def test_a_first_value_alone_takes_the_stored_statistics_and_an_empty_batch_whatever_there_is() -> None:
    model, x = trained(nn.Sequential(nn.BatchNorm1d(2))).eval(), torch.randn(1, 2)
    plain = model(x)
    first, empty, third = (y for _, y in adapting(model, [x, torch.zeros(0, 2), torch.randn(3, 2)], 0))
    assert torch.equal(first, plain) and empty.shape == (0, 2) and third.isfinite().all()


def test_while_training_and_frozen_nothing_changes() -> None:
    model, x = trained(cnn(dropout=0.0)), images(8)[0]
    plain = copy.deepcopy(model)
    with Handle(find_bn(model).values(), Adapting(find_bn(model), 0)):
        assert torch.equal(model.train()(x), plain.train()(x))
        with freeze_bn(model):
            assert torch.equal(model.eval()(x), plain.eval()(x))
