"""The observer and the forecaster recover what layers were given, hand-written ones and untracked calls included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import find_bn
from lightning_bn.tracking.drift import Observation
from lightning_bn.tracking.forecast import STEPS, StatisticsForecaster, Steps, forecast_statistics
from lightning_bn.tracking.observer import Observer
from lightning_bn.tracking.recovery import CUSTOM_UPDATE, UNMEASURABLE
from tests.hand_written import ZOO, Net, batches, truth

SIZES = (4, 8, 4, 6, 4)
RECOVERED = {
    *("plain", "BatchNorm2d", "transposed", "masked", "masked, arguments by name", "container", "padded", "rows"),
    *("by hand, by assignment", "by hand, in place", "torch.batch_norm", "a child"),
    *("own statistics, by assignment", "own statistics, in place", "DAWNBench's ghost"),
    *("timm BatchNormAct2d", "timm SplitBatchNorm2d", "timm SyncBatchNormAct", "SyncBatchNorm, no momentum"),
}
"""Layers of the zoo whose running statistics tell what their batches were."""


class Subclass(nn.BatchNorm1d):
    """Does what its base does."""


def statistics_of(layer: _BatchNorm) -> Tensor:
    return torch.stack([layer.running_mean, layer.running_var]).double()


def assert_gaps(observation: Observation, index: int, offsets: list[Tensor], rel: float = 2e-4) -> None:
    """Gaps are the root mean squares of some offsets, ``(2, C)`` each, of means and of variances."""
    for drift, of_kind in zip((observation.means, observation.variances), torch.stack(offsets, 1), strict=True):
        assert drift.gap[index].item() == pytest.approx(of_kind.square().mean().sqrt().item(), rel=rel)


def offsets_of(ema: Tensor, statistics: Tensor) -> Tensor:
    return torch.stack([(statistics[0] - ema[0]) / ema[1].sqrt(), (statistics[1] / ema[1]).log()])


def observe(net: Net, observer: Observer) -> tuple[Observation, dict[str, list[Tensor]]]:
    """The result of a window, and each batch's true offsets from the EMA before it."""
    layers = find_bn(net)
    offsets: dict[str, list[Tensor]] = {name: [] for name in layers}
    for x in batches(SIZES):
        before = {name: statistics_of(layer) for name, layer in layers.items()}
        rows = truth(net, [[x]]) if net.entry.given else {}
        observer.before_batch()
        net(x)
        assert observer.after_batch()
        for name, given in rows.items():
            offsets[name].append(offsets_of(before[name], torch.stack([given.mean(0), given.var(0)])))
    return observer.take(), offsets


SEEN_IN_PART = {"by hand, masked"}
"""Where the first batch has no padding, and is normalized as by torch: recovered from then on."""


@pytest.mark.parametrize("name", ZOO)
def test_gaps_are_those_of_what_the_layer_normalized_and_one_that_cannot_be_seen_is_marked(name: str) -> None:
    net = Net(ZOO[name]).train()
    observer = Observer(find_bn(net))
    windows = [observe(net, observer) for _ in range(2 if ZOO[name].given else 1)]
    for observation, offsets in windows:
        if ZOO[name].given:
            assert ("bn" not in observation.direct) == (name in RECOVERED)
            for index, of_layer in enumerate(offsets.values()):
                assert_gaps(observation, index, of_layer)
        else:
            assert observation.means.gap[1].isfinite() and "last" not in observation.direct
            assert observation.direct.get("bn") == UNMEASURABLE or name in SEEN_IN_PART
            assert observation.means.gap[0].isnan() == (name not in SEEN_IN_PART)


CALLS: dict[str, tuple[bool, bool, float | None]] = {
    "tracked": (True, True, 0.1),
    "at another momentum": (True, True, 0.3),
    "at momentum 0": (True, True, 0.0),
    "by flag": (True, False, 0.1),
    "in eval mode": (False, True, 0.1),
}
"""Mode, tracking and momentum of a call."""
every_layer = pytest.mark.parametrize("make", [nn.BatchNorm1d, Subclass])


def step(layer: _BatchNorm, kinds: list[str]) -> Tensor | None:
    """Call a layer several times and put it back as it was: true offsets of what has moved it, as the EMA weighs it."""
    ema = statistics_of(layer)
    moved, left = torch.zeros_like(ema), 1.0
    for kind in kinds:
        layer.training, layer.track_running_stats, layer.momentum = CALLS[kind]
        x = torch.randn(8, 3) * (1 + torch.rand(3)) + torch.randn(3)
        layer(x)
        if kind in ("tracked", "at another momentum"):
            share = layer.momentum
            moved = (1 - share) * moved + share * torch.stack([x.double().mean(0), x.double().var(0)])
            left *= 1 - share
    layer.training, layer.track_running_stats, layer.momentum = CALLS["tracked"]
    return None if left == 1 else offsets_of(ema, moved / (1 - left))


@every_layer
@pytest.mark.parametrize("later", ["tracked", "at momentum 0", "by flag", "in eval mode"])
@pytest.mark.parametrize(
    "first", [["tracked"], ["tracked", "at momentum 0"], ["by flag", "at another momentum", "tracked"]], ids="+".join
)
def test_within_a_window_a_step_is_right_or_left_out(make: Any, first: list[str], later: str) -> None:
    layer = make(3)
    observer = Observer({"bn": layer})
    offsets = []
    for kinds in (first, [later], [later, "tracked"], ["tracked"], first):
        observer.before_batch()
        offsets.append(step(layer, kinds))
        observer.after_batch()
    unknown = first == ["tracked"] and later in ("tracked", "at momentum 0") and make is nn.BatchNorm1d
    known = [o for o in offsets if o is not None and not (unknown and o is offsets[2])]
    assert_gaps(observer.take(), 0, known, rel=1e-3)


@pytest.mark.parametrize("name", ZOO)
def test_a_forecast_is_that_of_what_the_layer_normalized_or_the_layer_is_left_and_named(name: str) -> None:
    entry = ZOO[name]
    net, (x,) = Net(entry).train(), batches([8])
    forecast = StatisticsForecaster(find_bn(net))
    for _ in range(40):  # of one batch, which is the population then
        forecast.before_batch()
        net(x)
        forecast.after_batch()
    statistics, left = forecast.statistics(), forecast.left()
    assert not set(statistics) & set(left)
    assert not entry.given or ("bn" in statistics) == (name in RECOVERED)
    assert set(statistics) | set(left) == set(find_bn(net))
    for layer, rows in truth(net, [[x]]).items() if entry.given else ():
        if layer in statistics:
            torch.testing.assert_close(statistics[layer].mean, rows.mean(0), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(statistics[layer].var, rows.var(0), rtol=1e-3, atol=1e-3)
    assert left.get("bn") in (None, CUSTOM_UPDATE if entry.given else UNMEASURABLE)


@every_layer
def test_a_forecast_takes_in_what_moved_the_layer_and_not_what_it_saw_besides(make: Any) -> None:
    layer = make(3)
    forecast = StatisticsForecaster({"bn": layer})
    x, other = torch.randn(64, 3) + 2, torch.randn(64, 3) * 4 - 3
    for _ in range(40):
        forecast.before_batch()
        for kind in ("tracked", "at momentum 0", "by flag", "in eval mode"):
            layer.training, layer.track_running_stats, layer.momentum = CALLS[kind]
            layer(x if kind == "tracked" else other)
        layer.training, layer.track_running_stats, layer.momentum = CALLS["tracked"]
        forecast.after_batch()
    found = forecast.statistics()["bn"]
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.var, x.double().var(0), rtol=1e-3, atol=1e-3)


WIDTHS = [3, 2, 4]


def layers_of() -> dict[str, nn.BatchNorm1d]:
    return {str(i): nn.BatchNorm1d(size).double() for i, size in enumerate(WIDTHS)}


def running_of(layers: dict[str, nn.BatchNorm1d]) -> Tensor:
    return torch.stack([torch.cat([getattr(bn, f"running_{m}") for bn in layers.values()]) for m in ("mean", "var")])


def run_steps(
    layers: dict[str, nn.BatchNorm1d], *watching: StatisticsForecaster, start: int = 0, steps: int = 1
) -> Steps:
    """Some steps: the second layer rests in every fourth, others write in between, a momentum changes."""
    generator = torch.Generator().manual_seed(start)
    batches, before, called = [], [], []
    for step in range(start, start + steps):
        layers["0"].momentum = 0.3 if step >= 20 else 0.1
        if step % 10 == 9:
            layers["2"].running_mean.data.add_(0.5)  # of which no version tells
        rows = [0.03 * step + torch.randn(8, n, generator=generator, dtype=torch.float64) for n in WIDTHS]
        rests = step % 4 == 0
        before.append(running_of(layers))
        for each in watching:
            each.before_batch()
        for number, (bn, x) in enumerate(zip(layers.values(), rows, strict=True)):
            if not (rests and number == 1):
                bn(x)
        for each in watching:
            each.after_batch()
        batches.append(torch.stack([torch.cat([getattr(x, kind)(0) for x in rows]) for kind in ("mean", "var")]))
        called.append(torch.tensor([True] * 3 + [not rests] * 2 + [True] * 4))
    return Steps(torch.stack(batches), torch.stack(before), torch.stack(called))


@pytest.mark.parametrize("at_once", [1, 5, 100], ids="{} channels at a time".format)
def test_whenever_it_is_asked_it_has_seen_what_layers_were_given(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bn.tracking.forecast._CHANNELS_AT_ONCE", at_once)
    layers = layers_of()
    watched, parts = StatisticsForecaster(layers), []
    for start in range(0, 2 * STEPS, 8):
        parts.append(run_steps(layers, watched, start=start, steps=8))
        steps = Steps(*(torch.cat(values)[-STEPS:] for values in zip(*parts, strict=True)))
        truth = forecast_statistics(steps, running_of(layers), torch.full((9,), 1e-5).double(), WIDTHS)
        found = watched.statistics()
        for name, mean, var in zip(layers, truth.mean.split(WIDTHS), truth.var.split(WIDTHS), strict=True):
            torch.testing.assert_close(found[name].mean, mean, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(found[name].var, var, rtol=1e-6, atol=1e-8)


def test_it_continues_from_its_state_and_keeps_no_more_steps_than_documented() -> None:
    layers = layers_of()
    whole, resumed = StatisticsForecaster(layers), StatisticsForecaster(layers)
    whole.before_batch()  # of a step that never ends and so is left out
    layers["0"](torch.randn(8, 3).double())
    run_steps(layers, whole, steps=2)
    assert len(whole.state_dict()["steps"]) == 2
    run_steps(layers, whole, start=2, steps=STEPS + 1)
    assert len(whole.state_dict()["steps"]) == STEPS
    resumed.load_state_dict(whole.state_dict())
    run_steps(layers, whole, resumed, start=STEPS + 3, steps=5)
    for name, found in whole.statistics().items():
        assert torch.equal(found.mean, resumed.statistics()[name].mean)
        assert torch.equal(found.var, resumed.statistics()[name].var)
    others = StatisticsForecaster({"0": layers["0"]})
    with pytest.raises(ValueError, match="the layers were others"):
        others.load_state_dict(whole.state_dict())
    assert not others.state_dict()["steps"]
