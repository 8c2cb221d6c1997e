"""PreciseBN equals the float64 statistics over everything a layer was given, whatever the layer and the batches."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bn import find_bn, precise_bn
from tests.truth import Calls, assert_close_to, assert_measured, assert_stored, given, in_double, recorded
from tests.zoo import CASES, Shared, case, cnn, images


def normalized(layer: nn.Module, x: Tensor) -> Tensor:
    """What a BatchNorm layer, and the activation that timm puts into it, make of ``x`` in batch mode; in float64."""
    weight, bias = (None if p is None else p.double() for p in (layer.weight, layer.bias))
    x = x.double()
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0, keepdim=True)
    shape = [1, -1] + [1] * (x.ndim - 2)
    y = (x - mean) / (var + layer.eps).sqrt()
    y = y * (1 if weight is None else weight.reshape(shape)) + (0 if bias is None else bias.reshape(shape))
    return layer.act(y) if hasattr(layer, "act") else y


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_everything_a_layer_was_given(name: str) -> None:
    model, batches = case(name)
    with recorded(model) as calls:
        statistics = precise_bn(model, batches, normalization_batch_size="loader")
    assert set(calls) == set(find_bn(model))
    assert_measured(statistics, calls)
    assert_stored(model, statistics)
    assert statistics.num_batches == len(batches) and statistics.num_samples == sum(map(len, batches))


@pytest.mark.parametrize("name", [n for n in CASES if n != "bf16 model, mean 100"])
def test_every_batch_is_normalized_with_its_own_statistics(name: str) -> None:
    model, batches = case(name)
    with recorded(model) as calls:
        precise_bn(model, batches, normalization_batch_size="loader")
    for layer_name, layer in find_bn(model).items():
        for x, y in calls[layer_name]:
            mean, sigma = given([(x, y)]).mean(0), given([(x, y)]).std(0, correction=0)
            rounding = (2**-22 * mean.abs() / (sigma**2 + layer.eps).sqrt()).max().item()
            rounding += {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(y.dtype, 1e-5)
            wrong = (y.double() - normalized(layer, x)).abs().max().item()
            assert wrong <= 4 * rounding, layer_name
            assert y.dtype == x.dtype and y.shape == x.shape


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("bf16", "fp16")) and "float32" not in n])
def test_16_bit_layers_normalize_bit_by_bit_as_torch_does_in_training(name: str) -> None:
    """Which rounds the mean to 16 bits: with a large mean that is far from exact, and what the next layers train on."""
    model, batches = case(name)
    with recorded(model) as calls:
        precise_bn(model, batches, normalization_batch_size="loader")
    for layer_name, layer in find_bn(model).items():
        for x, y in calls[layer_name]:
            torchs = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
            assert torch.equal(y, torchs), layer_name


IN_SINGLE = [n for n in CASES if "16" not in n and "1e4" not in n and n != "one value per channel"]
"""Not 16-bit, whose rounding spreads, and nothing that torch refuses."""


@pytest.mark.parametrize("name", IN_SINGLE)
def test_statistics_are_those_of_torchs_own_layers_in_double_precision(name: str) -> None:
    model, batches = case(name)
    truth = in_double(model, batches)
    assert_close_to(precise_bn(model, batches, normalization_batch_size="loader"), truth, sigma=2e-5, var=1e-4)


def test_16_bit_autocast_is_measured_as_the_layers_see_it() -> None:
    model, batches = cnn(), images(8, 5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), recorded(model) as calls:
        statistics = precise_bn(model, batches, normalization_batch_size="loader")
    assert calls["1"][0][0].dtype == torch.bfloat16
    assert_measured(statistics, calls)
    assert_stored(model, statistics)


def test_population_variance_of_a_large_mean_never_cancels() -> None:
    """The case in which E[x^2] - E[x]^2 in float32 has produced variances of -8."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    batches = [torch.randn(16, 4, 8, 8) + 1e4 for _ in range(5)]
    statistics = precise_bn(model, batches, normalization_batch_size="loader")
    true_var = torch.cat(batches).double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(statistics["0"].var, true_var, rtol=2e-4, atol=0)
    torch.testing.assert_close(model[0].running_var.double(), true_var, rtol=2e-4, atol=0)


def test_a_compiled_model_is_measured_like_the_plain_one() -> None:
    model, batches = case("ragged batches")
    truth = in_double(model, batches)
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])  # graphs of train mode exist already
    statistics = precise_bn(compiled, batches, normalization_batch_size="loader")
    prefix = "_orig_mod."
    assert_close_to(precise_bn(model, batches, normalization_batch_size="loader"), truth, sigma=2e-5, var=1e-4)
    assert all(
        torch.equal(
            statistics[prefix + name].mean, precise_bn(model, batches, normalization_batch_size="loader")[name].mean
        )
        for name in truth
    )
    torch.testing.assert_close(compiled.eval()(batches[0]), copy.deepcopy(model).eval()(batches[0]))


def test_a_model_compiled_in_place_is_measured_like_the_plain_one() -> None:
    model, batches = case("ragged batches")
    truth = in_double(model, batches)
    model.compile(backend="eager")
    model(batches[0])
    assert_close_to(precise_bn(model, batches, normalization_batch_size="loader"), truth, sigma=2e-5, var=1e-4)


# --- which layers -----------------------------------------------------------------------------------------------------


class Skipping(nn.Module):
    """The second layer sees every other batch, the third none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm1d(3) for _ in range(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.calls += 1
        return self.b(x) if self.calls % 2 else x


def test_a_layer_that_is_not_reached_keeps_its_statistics() -> None:
    model = Skipping()
    model.c.running_mean.fill_(5)
    model.c.running_var.fill_(7)
    batches = [torch.randn(6, 3), torch.randn(4, 3), torch.randn(5, 3)]
    with recorded(model) as calls:
        statistics = precise_bn(model, batches, normalization_batch_size="loader")
    assert_measured(statistics, calls)
    assert list(statistics) == ["a", "b"] and statistics["b"].count == 11
    assert model.c.running_mean.eq(5).all() and model.c.running_var.eq(7).all()


def test_only_the_chosen_layers_are_estimated_and_the_others_normalize_with_what_they_have() -> None:
    model, batches = case("ragged batches")
    before = copy.deepcopy(model)
    with recorded(model) as calls:
        statistics = precise_bn(model, batches, layers=["5"], normalization_batch_size="loader")
    assert list(statistics) == ["5"]
    assert torch.equal(model[1].running_mean, before[1].running_mean)
    torch.testing.assert_close(calls["1"][0][1].relu(), F.relu(before[1].eval()(calls["1"][0][0])))


def test_a_pattern_that_matches_nothing_lists_the_names_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"layers='head\.\*' matches no BatchNorm layer of Sequential.*There are: 1, 5\."
    ):
        precise_bn(cnn(), images(4), layers=["1", "head.*"], normalization_batch_size="loader")


def test_a_model_without_batchnorm_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no BatchNorm layer"):
        precise_bn(nn.Sequential(nn.Linear(2, 2)), [torch.randn(2, 2)], normalization_batch_size="loader")


def test_layers_without_stored_statistics_are_left_out_unless_asked_for() -> None:
    model, batches = cnn(nn.BatchNorm2d(8, track_running_stats=False)), images(8, 4)
    truth = in_double(model, batches)
    statistics = precise_bn(model, batches, normalization_batch_size="loader")
    assert list(statistics) == ["5"]
    assert_close_to(statistics, {"5": truth["5"]}, sigma=2e-5, var=1e-4)
    with pytest.raises(ValueError, match="1: track_running_stats=False, so there are no population statistics"):
        precise_bn(model, batches, layers="1", normalization_batch_size="loader")


def test_a_lazy_layer_that_has_seen_no_data_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Layer '1' is lazy and not initialized: run one forward"):
        precise_bn(cnn(nn.LazyBatchNorm2d()), images(4), normalization_batch_size="loader")


# --- which batches ----------------------------------------------------------------------------------------------------


def to_tuple(x: Tensor) -> Any:
    return x, torch.zeros(len(x))


def to_list(x: Tensor) -> Any:
    return [x, torch.zeros(len(x))]


def to_keywords(x: Tensor) -> Any:
    return {"input": x}


@pytest.mark.parametrize("wrap", [to_tuple, to_list, to_keywords])
def test_batches_of_tuples_lists_and_mappings_reach_the_model(wrap: Callable[[Tensor], Any]) -> None:
    model, batches = case("ragged batches")
    truth = in_double(model, batches)
    statistics = precise_bn(model, map(wrap, batches), normalization_batch_size="loader")
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)
    assert statistics.num_samples == 20


def test_the_callers_forward_and_count_are_used() -> None:
    model, batches = case("ragged batches")
    truth = in_double(model, batches)
    wrapped = [{"id": "x", "image": {"pixels": batch}} for batch in batches]
    statistics = precise_bn(
        model,
        wrapped,
        forward=lambda m, batch: m(batch["image"]["pixels"]),
        batch_size_fn=lambda batch: 10 * len(batch["image"]["pixels"]),
        normalization_batch_size="loader",
    )
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)
    assert statistics.num_samples == 200


@dataclass
class Batch:
    name: str
    image: Tensor


def test_samples_are_counted_in_nested_batches_and_dataclasses() -> None:
    model, batches = case("ragged batches")
    nested = [{"meta": ["a", None], "data": (Batch("b", x),)} for x in batches]
    statistics = precise_bn(
        model, nested, forward=lambda m, batch: m(batch["data"][0].image), normalization_batch_size="loader"
    )
    assert statistics.num_samples == 20


def test_a_batch_without_any_tensor_needs_count() -> None:
    model, (batch, *_) = case("ragged batches")
    with pytest.raises(
        ValueError, match=r"Cannot infer the number of samples in a batch that is a str: .*Pass batch_size_fn="
    ):
        precise_bn(model, ["a"], forward=lambda m, _: m(batch), normalization_batch_size="loader")


@pytest.mark.parametrize(("num_samples", "batches"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3), (1000, 3)])
def test_whole_batches_are_taken_until_num_samples_were_seen(num_samples: int, batches: int) -> None:
    model, _ = case("ragged batches")
    data = images(8, 8, 3)
    truth = in_double(model, data[:batches])
    statistics = precise_bn(model, data, num_samples=num_samples, normalization_batch_size="loader")
    assert statistics.num_batches == batches
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)


@pytest.mark.parametrize("batch_size", ["loader", "population"])
def test_dropout_stays_off_and_layers_on_if_the_forward_asks_for_train_mode(batch_size: Any) -> None:
    model, batches = case("ragged batches")
    modes = [m.training for m in model.modules()]
    truth = in_double(model, batches if batch_size == "loader" else [torch.cat(batches)])
    statistics = precise_bn(model, batches, forward=lambda m, x: m.train()(x), normalization_batch_size=batch_size)
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)
    assert_stored(model, statistics)
    assert [m.training for m in model.modules()] == modes
    assert model.train()[3].training and not model.eval()[3].training, "train() is torch's own again"


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("batch_size", ["loader", 4, "population"])
def test_an_empty_batch_is_skipped_wherever_it_stands(where: int, batch_size: Any) -> None:
    model, batches = case("ragged batches")
    expected = precise_bn(copy.deepcopy(model), batches, normalization_batch_size=batch_size)
    batches.insert(where, batches[0][:0])
    statistics = precise_bn(model, batches, normalization_batch_size=batch_size)
    assert all(torch.equal(statistics[name].mean, expected[name].mean) for name in expected)
    assert (statistics.num_samples, statistics.num_batches) == (expected.num_samples, expected.num_batches)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("batch_size", ["loader", 10, "population"])
@pytest.mark.parametrize("bad", [{0}, {1}, {2, 3}, {0, 1, 3}])
def test_a_batch_with_non_finite_values_is_left_out_and_said(bad: set[int], batch_size: Any, poison: float) -> None:
    model, batches = case("ragged batches")
    good = [x for i, x in enumerate(batches) if i not in bad]
    for i in bad:
        batches[i][0, 0] = poison
    expected = precise_bn(
        copy.deepcopy(model), good, normalization_batch_size="population" if batch_size != "loader" else "loader"
    )
    message = rf"Batch {min(bad)} of a pass .* it gives layer '1' non-finite"
    with pytest.warns(UserWarning, match=message) as said:
        statistics = precise_bn(model, batches, normalization_batch_size=batch_size)
    assert len(said) == 1
    assert statistics.left_out == len(bad) and statistics.num_batches == len(good)
    assert statistics.num_samples == sum(map(len, good))
    if batch_size != 10:
        for name, measured in statistics.items():
            torch.testing.assert_close(measured.mean, expected[name].mean, rtol=0, atol=1e-6)
            torch.testing.assert_close(measured.var, expected[name].var, rtol=1e-5, atol=0)
            assert measured.calls == expected[name].calls and measured.count == expected[name].count


def test_progress_is_shown_in_samples_if_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    model, batches = case("ragged batches")
    precise_bn(model, batches, num_samples=20, normalization_batch_size="loader")
    assert not capfd.readouterr().err
    precise_bn(
        model,
        batches,
        forward=lambda m, x: time.sleep(0.12) or m(x),
        num_samples=20,
        progress=True,
        normalization_batch_size="loader",
    )
    assert re.search(r"PreciseBN: .* 16/20 ", capfd.readouterr().err), "tqdm shows what is older than 0.1 seconds"


def test_no_batch_is_fetched_that_is_not_used() -> None:
    model, data = case("ragged batches")
    batches = iter(data)
    precise_bn(model, batches, num_samples=8, normalization_batch_size="loader")
    assert len(list(batches)) == len(data) - 1


@pytest.mark.parametrize("num_samples", [0, -1])
def test_num_samples_that_asks_for_nothing_is_refused(num_samples: int) -> None:
    model, batches = case("ragged batches")
    with pytest.raises(ValueError, match=f"num_samples must be at least 1 but is {num_samples}"):
        precise_bn(model, batches, num_samples=num_samples, normalization_batch_size="loader")


@pytest.mark.parametrize("num_samples", [10.0, "10", True])
def test_num_samples_that_is_no_whole_number_is_refused(num_samples: Any) -> None:
    model, batches = case("ragged batches")
    with pytest.raises(TypeError, match="num_samples must be a whole number but is"):
        precise_bn(model, batches, num_samples=num_samples, normalization_batch_size="loader")


def test_a_single_value_per_channel_in_all_has_no_variance_and_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="Layer '0' received one value per channel in all, which has no variance"):
        precise_bn(model, [torch.randn(1, 3)], normalization_batch_size="loader")
    assert model[0].running_var.eq(1).all() and model[0].running_mean.eq(0).all()


def test_an_empty_iterable_is_refused_and_nothing_is_zeroed() -> None:
    model, _ = case("ragged batches")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"No batch reached a BatchNorm layer of 1, 5 in a way .* is the iterable of batches empty"
    ):
        precise_bn(model, [], normalization_batch_size="loader")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_poisoned_running_statistics_recover(poison: float, layout: torch.memory_format) -> None:
    model, batches = case("ragged batches")
    model, batches = model.to(memory_format=layout), [x.to(memory_format=layout) for x in batches]
    for layer in find_bn(model).values():
        layer.running_mean.fill_(poison)
        layer.running_var.fill_(poison)
    with recorded(model) as calls:
        statistics = precise_bn(model, batches, normalization_batch_size="loader")
    assert_measured(statistics, calls)
    assert_stored(model, statistics)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["ragged batches", "channels_last", "BatchNorm1d, rows", "bf16 model"])
def test_non_finite_values_are_refused_with_the_layers_name_and_nothing_is_written(name: str, poison: float) -> None:
    model, batches = case(name)
    before = copy.deepcopy(model.state_dict())
    batches[1][0, 0] = poison
    with pytest.raises(
        ValueError, match=r"Layer '1' received non-finite values, .* in every batch, so no statistics were written"
    ):
        precise_bn(model, batches[1:2], normalization_batch_size="loader")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_non_finite_values_inside_the_network_are_found_where_they_arise() -> None:
    model, batches = case("ragged batches")
    with torch.no_grad():
        model[4].weight[0] = math.inf
    with pytest.raises(ValueError, match=r"Layer '5' received non-finite values, .* in every batch"):
        precise_bn(model, batches, normalization_batch_size="loader")


def test_a_variance_that_the_buffers_cannot_hold_is_refused_and_nothing_is_written() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).half()
    before = copy.deepcopy(model.state_dict())
    batch = (torch.randn(64, 2) * 1e3).half()
    with pytest.raises(ValueError, match=r"running_var of layer '1' reaches .*e\+0[56]: torch\.float16 cannot hold it"):
        precise_bn(model, [batch], forward=lambda m, x: (m[0](x / 1e3), m[1](x)), normalization_batch_size="loader")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_shared_layers_weigh_every_call_by_its_values() -> None:
    model, batches = Shared(), images(8, 4)
    truth = in_double(model, batches)
    statistics = precise_bn(model, batches, normalization_batch_size="loader")
    assert statistics["bn"].count == sum(len(x) for x in batches) * (64 + 16) and statistics["bn"].calls == 4
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)


def test_an_input_without_rows_counts_for_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    calls: Calls
    with recorded(model) as calls:
        statistics = precise_bn(
            model,
            [torch.randn(n, 3) for n in (6, 1, 8)],
            forward=lambda m, x: m(x[1:]),
            normalization_batch_size="loader",
        )
    assert_measured(statistics, calls)
    assert statistics["0"].calls == 2 and calls["0"][1][1].shape == (0, 3)


def test_micro_batches_that_are_parts_of_one_large_tensor_need_no_more_memory_than_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.randn(1000, 3, 8, 8)
    monkeypatch.setattr("lightning_bn.lockstep.pooled.free_memory", lambda device: 20 * images.nbytes)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert precise_bn(model, images.split(4), normalization_batch_size="population").num_samples == 1000
