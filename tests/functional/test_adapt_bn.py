"""adapt_bn stores the target's statistics, mixed with a prior as stated, and puts the original bits back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import adapt_bn, find_bn, freeze_bn, mini_batch_inference, precise_bn
from lightning_bn.functional.adapt import Adapting, mix_with_prior
from lightning_bn.layers.behavior import Handle
from tests.truth import in_double, recorded, rows_of
from tests.zoo import CASES, Shared, case, cnn, images


def trained(model: nn.Module) -> nn.Module:
    """Stored statistics that are not those of a fresh model."""
    for layer in find_bn(model).values():
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: buffer.clone() for key, buffer in model.named_buffers()}


def assert_same(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


@pytest.mark.parametrize(("prior", "share"), [(0, 0.0), (19, 0.5), (57, 0.75)])
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


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_gets_its_bits_back(name: str) -> None:
    model, batches = case(name)
    before, objects = buffers_of(model), [id(b) for b in model.buffers()]
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    with adapt_bn(model, batches, prior_samples=3) as handle:
        assert handle.statistics and not all(torch.equal(before[k], v) for k, v in model.named_buffers())
    assert_same(model, before)
    assert objects == [id(b) for b in model.buffers()]
    assert (classes, modes) == ([type(m) for m in model.modules()], [m.training for m in model.modules()])


def test_the_original_statistics_come_back_after_an_exception_and_only_once() -> None:
    model = trained(cnn())
    before = buffers_of(model)
    with pytest.raises(KeyboardInterrupt), adapt_bn(model, images(8)) as handle:
        raise KeyboardInterrupt
    assert_same(model, before)
    model[1].running_mean.fill_(5)
    handle.undo()
    assert model[1].running_mean.eq(5).all()


def test_a_failed_measurement_changes_nothing() -> None:
    model = trained(cnn())
    before, bad = buffers_of(model), images(4, 4)
    bad[1][0] = torch.nan
    for batches in ([], bad[1:]):
        with pytest.raises(ValueError, match=r"No batch reached|non-finite"):
            adapt_bn(model, batches)
        assert_same(model, before)
        assert type(model[1]) is nn.BatchNorm2d


def test_it_works_under_inference_mode_and_the_model_trains_on_afterwards() -> None:
    model = trained(cnn())
    before = buffers_of(model)
    with torch.inference_mode():
        handle = adapt_bn(model, images(8))
        model.eval()(images(4)[0])
    handle.undo()
    assert_same(model, before)
    model.train()(images(8)[0]).sum().backward()
    assert not any(buffer.is_inference() for buffer in model.buffers())


def test_it_survives_a_change_of_dtype_in_between() -> None:
    """Which replaces buffers, as moving to another device does."""
    model = trained(cnn())
    before = buffers_of(model)
    handle = adapt_bn(model, images(8))
    model.double()
    handle.undo()
    assert_same(model.float(), before)


def test_only_the_chosen_layers_adapt_and_num_samples_counts() -> None:
    model = trained(cnn())
    before = buffers_of(model)
    with adapt_bn(model, images(8, 8, 8), layers="5", num_samples=9) as handle:
        assert list(handle.statistics) == ["5"] and handle.statistics.num_samples == 16
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
        assert "adapted" in repr(model[5]) and "adapted" not in repr(model[1])


def test_frozen_layers_keep_their_statistics() -> None:
    model = trained(cnn())
    before = buffers_of(model)
    with freeze_bn(model, layers="1"), adapt_bn(model, images(8)) as handle:
        assert list(handle.statistics) == ["5"]
    with freeze_bn(model), pytest.raises(ValueError, match="are frozen"):
        adapt_bn(model, images(8))
    assert_same(model, before)


def test_a_pickle_in_between_is_a_plain_model_with_the_targets_statistics() -> None:
    model = trained(cnn())
    with adapt_bn(model, images(8)):
        twin = pickle.loads(pickle.dumps(model))
        assert_same(twin, buffers_of(model))
        assert type(twin[1]) is nn.BatchNorm2d


def test_what_would_not_work_is_refused_by_name() -> None:
    model = trained(cnn())
    before = buffers_of(model)
    with adapt_bn(model, images(8), layers="5"), pytest.raises(ValueError, match=r"Layer .5. already has AdaBN"):
        adapt_bn(model, images(8))
    with (
        mini_batch_inference(model, layers="5"),
        pytest.raises(ValueError, match="cannot have AdaBN, because it has mini-batch"),
    ):
        adapt_bn(model, images(8))
    for bad, error in ((-1, ValueError), (0.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="prior_samples must be"):
            adapt_bn(model, images(8), prior_samples=bad)  # type: ignore[arg-type]
    assert_same(model, before)


def test_a_shift_is_undone_by_adapting_to_it() -> None:
    """The claim of AdaBN in its purest form: an affine shift of every channel's input disappears."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).eval()
    source = [x + torch.arange(3.0).view(3, 1, 1) for x in images(16, 16)]
    precise_bn(model, source, normalization_batch_size="loader")
    expected = model(source[0])
    target = [5 * x - 7 for x in source]
    assert (model(target[0]) - expected).abs().max() > 1
    with adapt_bn(model, target):
        torch.testing.assert_close(model(target[0]), expected, rtol=1e-3, atol=1e-4)


# --- batch by batch ---------------------------------------------------------------------------------------------------


def adapting(model: nn.Module, batches: list[Tensor], prior: int) -> list[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What layers were given, and made of it, batch after batch."""
    behavior, found = Adapting(find_bn(model), prior), []
    with Handle(find_bn(model).values(), behavior), torch.inference_mode():
        for batch in batches:
            behavior.samples += len(batch)
            with recorded(model) as calls:
                model(batch)
            found.append(calls)
    return found


@pytest.mark.parametrize("prior", [0, 10])
@pytest.mark.parametrize("make", [cnn, Shared])
def test_each_batch_is_normalized_with_all_that_came_so_far(make: Any, prior: int) -> None:
    model, batches = trained(make()).eval(), images(8, 3, 5, mean=1)
    before, samples = buffers_of(model), 0
    rows: dict[str, list[Tensor]] = {}
    for batch, calls in zip(batches, adapting(model, batches, prior), strict=True):
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
    model, batches = trained(cnn()).eval(), images(8, 3, 5)
    compiled, outputs = torch.compile(model, backend="eager"), []
    with torch.no_grad():
        compiled(batches[0])
        for run in (model, compiled):
            behavior = Adapting(find_bn(model), 4)
            with Handle(find_bn(model).values(), behavior):
                for batch in batches:
                    behavior.samples += len(batch)
                    outputs.append(run(batch))
        with adapt_bn(model, batches):
            torch.testing.assert_close(compiled(batches[0]), model(batches[0]))
    torch.testing.assert_close(outputs[:3], outputs[3:])


def test_a_first_value_alone_takes_the_stored_statistics_and_an_empty_batch_whatever_there_is() -> None:
    model = trained(nn.Sequential(nn.BatchNorm1d(2))).eval()
    x = torch.randn(1, 2)
    plain = model(x)
    calls = adapting(model, [x, torch.zeros(0, 2), torch.randn(3, 2)], 0)
    assert torch.equal(calls[0]["0"][0][1], plain) and calls[1]["0"][0][1].shape == (0, 2)
    assert calls[2]["0"][0][1].isfinite().all()


def test_while_training_and_frozen_nothing_changes() -> None:
    model, x = trained(cnn()), images(8)[0]
    model[3].p = 0.0
    plain = copy.deepcopy(model)
    with Handle(find_bn(model).values(), Adapting(find_bn(model), 0)):
        assert torch.equal(model.train()(x), plain.train()(x))
        with freeze_bn(model):
            assert torch.equal(model.eval()(x), plain.eval()(x))


def test_the_mixture_is_a_weighted_mean_of_each_statistic() -> None:
    source, target = torch.tensor([0.0, 1.0]), torch.tensor([8.0, 5.0])
    assert mix_with_prior(source, target, 0, 10) is target
    assert torch.equal(mix_with_prior(source, target, 16, 16), torch.tensor([4.0, 3.0]))
    assert torch.equal(mix_with_prior(source, target, 3, 1), torch.tensor([2.0, 2.0]))
