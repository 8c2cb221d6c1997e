"""PreciseBN equals the float64 statistics over all that a layer was given; a pass stops when they are known well."""

import copy
import math
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bn import PopulationStatistics, find_bn, precise_bn
from tests.truth import assert_close_to, assert_measured, assert_stored, given, in_double, recorded
from tests.zoo import CASES, case, cnn, images

one_pass = partial(precise_bn, normalization_batch_size="loader")
Net = nn.Sequential


def ragged() -> tuple[Any, list[Tensor]]:
    return case("ragged batches")


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_everything_a_layer_was_given(name: str) -> None:
    model, batches = case(name)
    exact = "16" not in name and "1e4" not in name and name != "one value per channel"
    truth = in_double(model, batches) if exact else {}  # not where rounding spreads, nor what torch refuses
    for layer in find_bn(model).values():  # they recover, whatever they were
        layer.running_mean.fill_(math.nan), layer.running_var.fill_(math.inf)
    with recorded(model) as calls:
        statistics = one_pass(model, batches)
    assert set(calls) == set(find_bn(model))
    assert_measured(statistics, calls)
    assert_stored(model, statistics)
    assert statistics.num_batches == len(batches) and statistics.num_samples == sum(map(len, batches))
    if exact:
        assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)
    for layer_name, layer in find_bn(model).items() if name != "one value per channel" else ():
        weight, bias, act = layer.weight, layer.bias, getattr(layer, "act", lambda y: y)
        for x, y in calls[layer_name]:
            if layer.running_mean.element_size() == 2:  # as torch does in training, which rounds the mean to 16 bits
                assert torch.equal(y, F.batch_norm(x, None, None, weight, bias, True, eps=layer.eps)), layer_name
                continue
            weight, bias = (None if p is None else p.double() for p in (weight, bias))
            normalized = act(F.batch_norm(x.double(), None, None, weight, bias, True, eps=layer.eps))
            mean, sigma = given([(x, y)]).mean(0), given([(x, y)]).std(0, correction=0)
            rounding = (2**-22 * mean.abs() / (sigma**2 + layer.eps).sqrt()).max().item()
            rounding += 3e-2 if y.dtype == torch.bfloat16 else 1e-5
            assert (y.double() - normalized).abs().max().item() <= 4 * rounding, layer_name
            assert y.dtype == x.dtype and y.shape == x.shape


def test_16_bit_autocast_is_measured_as_the_layers_see_it() -> None:
    model, batches = cnn(), images(8, 5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), recorded(model) as calls:
        statistics = one_pass(model, batches)
    assert calls["1"][0][0].dtype == torch.bfloat16
    assert_measured(statistics, calls)
    assert_stored(model, statistics)


@pytest.mark.parametrize("batch_size", ["loader", "population"])
def test_a_compiled_model_is_measured_like_the_plain_one(batch_size: Any) -> None:
    model, batches = ragged()
    truth = in_double(model, batches if batch_size == "loader" else [torch.cat(batches)])
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])  # graphs of train mode exist already
    statistics = precise_bn(compiled, batches, normalization_batch_size=batch_size)
    assert_close_to({n.removeprefix("_orig_mod."): s for n, s in statistics.items()}, truth, sigma=2e-5, var=1e-4)
    torch.testing.assert_close(compiled.eval()(batches[0]), copy.deepcopy(model).eval()(batches[0]))
    model.train().compile(backend="eager")
    model(batches[0])
    assert_close_to(precise_bn(model, batches, normalization_batch_size=batch_size), truth, sigma=2e-5, var=1e-4)


@pytest.mark.parametrize("wrap", [lambda x: (x, x[:, 0]), lambda x: [x, x[:, 0]], lambda x: {"input": x}])
def test_batches_of_tuples_lists_and_mappings_reach_the_model(wrap: Callable[[Tensor], Any]) -> None:
    model, batches = ragged()
    truth = in_double(model, batches)
    statistics = one_pass(model, map(wrap, batches))
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)
    assert statistics.num_samples == 20
    assert one_pass(model, map(wrap, batches), batch_size_fn=lambda _: 10).num_samples == 40


@pytest.mark.parametrize(("num_samples", "batches"), [(1, 1), (8, 1), (9, 2), (1000, 3)])
@pytest.mark.parametrize("batch_size", ["loader", "population"])
def test_whole_batches_are_taken_until_num_samples_were_seen(batch_size: Any, num_samples: int, batches: int) -> None:
    (model, _), data, seen = ragged(), images(8, 8, 3), []
    truth = in_double(model, data[:batches] if batch_size == "loader" else [torch.cat(data[:batches])])
    fetched = (seen.append(1) or x for x in data)
    statistics = precise_bn(model, fetched, num_samples=num_samples, normalization_batch_size=batch_size)
    assert statistics.num_batches == batches == len(seen), "no batch is fetched that is not used"
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)


@pytest.mark.parametrize("batch_size", ["loader", "population"])
def test_dropout_stays_off_and_layers_on_if_the_forward_asks_for_train_mode(batch_size: Any) -> None:
    model, batches = ragged()
    modes = [m.training for m in model.modules()]
    truth = in_double(model, batches if batch_size == "loader" else [torch.cat(batches)])
    statistics = precise_bn(model, batches, forward=lambda m, x: m.train()(x), normalization_batch_size=batch_size)
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)
    assert_stored(model, statistics)
    assert [m.training for m in model.modules()] == modes
    assert model.train()[3].training and not model.eval()[3].training, "train() is torch's own again"


@pytest.mark.parametrize(
    ("batch_size", "bad", "poison"),
    [
        *((batch_size, {0, 1, 3}, math.nan) for batch_size in ("loader", 10, "population")),
        *(("loader", {1}, math.inf), ("population", {0}, math.inf), ("population", {2, 3}, math.nan)),
    ],
)
def test_a_batch_with_non_finite_values_is_left_out_and_said(batch_size: Any, bad: set[int], poison: float) -> None:
    model, batches = ragged()
    good = [x for i, x in enumerate(batches) if i not in bad]
    for i in bad:
        batches[i][0, 0] = poison
    together = "population" if batch_size != "loader" else "loader"
    expected = precise_bn(copy.deepcopy(model), good, normalization_batch_size=together)
    message = rf"Batch {min(bad)} of a pass .* it gives layer '1' non-finite"
    with pytest.warns(UserWarning, match=message) as said:
        statistics = precise_bn(model, batches, normalization_batch_size=batch_size)
    assert len(said) == 1
    assert statistics.left_out == len(bad) and statistics.num_batches == len(good)
    assert statistics.num_samples == sum(map(len, good))
    for name, measured in statistics.items() if batch_size != 10 else ():
        torch.testing.assert_close(measured.mean, expected[name].mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(measured.var, expected[name].var, rtol=1e-5, atol=0)
        assert measured.calls == expected[name].calls and measured.count == expected[name].count


def test_progress_is_shown_in_samples_if_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    model, batches = ragged()
    one_pass(model, batches, num_samples=20)
    assert not capfd.readouterr().err
    one_pass(model, batches, forward=lambda m, x: time.sleep(0.12) or m(x), num_samples=20, progress=True)
    assert re.search(r"PreciseBN: .* 16/20 ", capfd.readouterr().err), "tqdm shows what is older than 0.1 seconds"


def of_three() -> nn.Module:
    return Net(nn.BatchNorm1d(3))


def without_spread(model: Any, x: Tensor) -> None:
    model[0](x / 1e3), model[1](x)


def broken() -> Any:
    model = cnn()
    nn.init.constant_(model[4].weight, math.inf)
    return model


REFUSED: list[tuple[Callable[[], nn.Module], list[Any], dict[str, Any], type[Exception], str]] = [
    (cnn, [*images(4)], {"layers": ["1", "head.*"]}, ValueError,
     r"layers='head\.\*' matches no BatchNorm layer of Sequential.*There are: 1, 5\."),
    (lambda: Net(nn.Linear(2, 2)), [torch.randn(2, 2)], {}, ValueError, "Sequential has no BatchNorm layer"),
    (lambda: cnn(nn.LazyBatchNorm2d()), images(4), {}, ValueError,
     "Layer '1' is lazy and not initialized: run one forward"),
    (cnn, ["a"], {"forward": lambda m, _: m(*images(4))}, ValueError,
     r"Cannot infer the number of samples in a batch that is a str: .*Pass batch_size_fn="),
    *((cnn, images(4), {"num_samples": n}, ValueError, f"num_samples must be at least 1 but is {n}") for n in (0, -1)),
    *((cnn, images(4), {"num_samples": n}, TypeError, "num_samples must be a whole number but is")
      for n in (10.0, "10", True)),
    (of_three, [torch.randn(1, 3)], {}, ValueError,
     "Layer '0' received one value per channel in all, which has no variance"),
    (cnn, [], {}, ValueError,
     r"No batch reached a BatchNorm layer of 1, 5 in a way .* is the iterable of batches empty"),
    *((cnn, [torch.full((2, 3, 8, 8), bad)], {}, ValueError,
       r"Layer '1' received non-finite values, .* in every batch, so no statistics were written")
      for bad in (math.nan, math.inf, -math.inf)),
    (broken, images(4, 4), {}, ValueError, r"Layer '5' received non-finite values, .* in every batch"),
    (lambda: Net(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).half(), [(torch.randn(64, 2) * 1e3).half()],
     {"forward": without_spread}, ValueError,
     r"running_var of layer '1' reaches .*e\+0[56]: torch\.float16 cannot hold it"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "batches", "kwargs", "error", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused_by_name_and_nothing_is_written(
    make: Callable[[], nn.Module], batches: list[Any], kwargs: Any, error: type[Exception], message: str
) -> None:
    model = make()
    before = {k: v.clone() for k, v in model.named_buffers() if not nn.parameter.is_lazy(v)}
    with pytest.raises(error, match=message):
        one_pass(model, batches, **kwargs)
    assert all(torch.equal(value, model.get_buffer(key)) for key, value in before.items())


def test_parts_of_one_large_tensor_need_no_more_memory_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(200, 3, 8, 8)
    monkeypatch.setattr("lightning_bn.lockstep.pooled.free_memory", lambda device: 20 * images.nbytes)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert precise_bn(model, images.split(4), normalization_batch_size="population").num_samples == 200


def samples(count: int) -> Tensor:
    """Of a skewed, a heavy-tailed and a normal population."""
    x = torch.randn(count, 3)
    return torch.stack([x[:, 0] + 0.3 * x[:, 0].square(), x[:, 1] * (1 + x[:, 1].abs()), 5 + 2 * x[:, 2]], 1)


def drawn(size: int, number: int) -> Iterator[Tensor]:
    return (samples(size) for _ in range(number))


def errors(statistics: PopulationStatistics) -> Tensor:
    """Standard errors of mean and variance, ``(2, C)``, as a pass says them."""
    return torch.stack([statistics["0"].standard_error, statistics["0"].var_standard_error])


@pytest.mark.parametrize("batch_size", ["loader", 32])
def test_standard_errors_are_the_spread_of_repetitions(batch_size: Any) -> None:
    repeated = [
        precise_bn(of_three(), samples(320).split([8, 24] * 10), normalization_batch_size=batch_size)
        for _ in range(100)
    ]
    means, variances = (torch.stack([getattr(s["0"], kind) for s in repeated]) for kind in ("mean", "var"))
    said = torch.stack([errors(s).square() for s in repeated]).mean(0).sqrt()
    real = torch.stack([means.std(0) / variances.mean(0).sqrt(), variances.std(0) / variances.mean(0)])
    torch.testing.assert_close(said[:, [0, 2]], real[:, [0, 2]], rtol=0.2, atol=0)
    torch.testing.assert_close(said, real, rtol=0.3, atol=0)  # heavy tails are hard to know


def test_a_pass_stops_as_soon_as_every_layer_is_known_well_enough() -> None:
    used = []
    for tolerance in (0.2, 0.1, 0.05):
        seen: list[int] = []
        counted = (seen.append(1) or x for x in drawn(16, 2000))
        statistics = precise_bn(of_three(), counted, tolerance=tolerance, normalization_batch_size="loader")
        assert errors(statistics).square().mean(1).sqrt().max() < tolerance
        assert len(seen) == statistics.num_batches < 2000, "no batch is fetched that is not used"
        used.append(statistics.num_samples)
    assert used[0] < used[1] < used[2]


def test_the_worst_of_many_layers_decides_and_one_called_once_is_not_known() -> None:
    model, calls = nn.ModuleDict({name: nn.BatchNorm1d(3) for name in ("often", "seldom")}), []

    def forward(model: Any, x: Tensor) -> None:
        calls.append("seldom" if len(calls) % 40 == 0 else "often")
        model[calls[-1]](x)

    kwargs: Any = {"tolerance": 0.2, "normalization_batch_size": "loader", "forward": forward}
    statistics = precise_bn(model, (torch.randn(512, 3) for _ in range(100)), **kwargs)
    assert statistics["seldom"].calls >= 2
    assert statistics.num_batches < 100


def test_eight_batches_are_the_least() -> None:
    statistics = precise_bn(of_three(), drawn(4, 100), tolerance=1e6, normalization_batch_size="loader")
    assert statistics.num_batches == 8
    statistics = precise_bn(of_three(), drawn(4, 100), tolerance=1e6, normalization_batch_size=8)
    assert (statistics.num_batches, statistics.batch_size) == (16, 8)


@pytest.mark.parametrize("batch_size", ["loader", 32])
def test_num_samples_and_the_batches_there_are_bound_it(batch_size: Any) -> None:
    for bound, samples in ((320, 320), (None, 640)):
        kwargs: Any = {"tolerance": 1e-9, "normalization_batch_size": batch_size, "num_samples": bound}
        assert precise_bn(of_three(), drawn(16, 40), **kwargs).num_samples == samples


def test_a_channel_that_never_varies_does_not_matter() -> None:
    partly = (x * torch.tensor([1.0, 0.0, 1.0]) for x in drawn(32, 1000))
    assert precise_bn(of_three(), partly, tolerance=0.1, normalization_batch_size="loader").num_batches < 1000


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"tolerance": 0}, ValueError, "tolerance must be above 0 but is 0"),
        ({"tolerance": -0.1}, ValueError, "tolerance must be above 0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be above 0"),
        ({"tolerance": True}, TypeError, "tolerance must be a number but is True"),
        ({"tolerance": "0.1"}, TypeError, "tolerance must be a number but is '0.1'"),
        ({"tolerance": 0.1, "normalization_batch_size": "population"}, ValueError,
         "'population' is a single one: leave one of them out"),
        ({"normalization_batch_size": 0}, ValueError, "normalization_batch_size must be at least 1 but is 0"),
        ({"normalization_batch_size": "all"}, ValueError,
         "normalization_batch_size must be a number of samples, 'auto', 'loader'"),
        ({"normalization_batch_size": 2.0}, TypeError, "normalization_batch_size must be a whole number"),
        ({"normalization_batch_size": True}, TypeError, "normalization_batch_size must be a whole number"),
        ({"memory_limit": 0}, ValueError, "memory_limit must be at least 1"),
        ({"memory_limit": 1e9}, TypeError, "memory_limit must be a whole number"),
    ],
)  # fmt: skip
def test_unusable_arguments_are_refused_before_any_batch(kwargs: dict[str, Any], error: Any, message: str) -> None:
    data = iter(images(4))
    with pytest.raises(error, match=message):
        precise_bn(cnn(), data, **kwargs)
    assert len(list(data)) == 1


def test_gaps_say_whether_b_matters() -> None:
    model, x = cnn().double(), torch.cat(images(2, 2, 2, 2)).double()
    exact = precise_bn(model, x.split(2), normalization_batch_size="population")
    assert max(map(max, exact.gaps_to(precise_bn(model, [x], normalization_batch_size="loader")).values())) < 1e-9
    gaps = exact.gaps_to(precise_bn(model, x.split(2), normalization_batch_size="loader"))
    assert set(gaps) == {"1", "5"}
    assert max(gaps["1"]) < 1e-9, "the first layer's input is the same"
    assert min(gaps["5"]) > 1e-3
