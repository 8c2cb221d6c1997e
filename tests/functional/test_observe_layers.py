"""The observer, and the forecast, on layers that people write themselves and steps that switch tracking off."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import find_bn
from lightning_bn.tracking.drift import Observation
from lightning_bn.tracking.forecast import StatisticsForecaster
from lightning_bn.tracking.observer import Observer
from lightning_bn.tracking.recovery import CUSTOM_UPDATE, UNMEASURABLE
from tests.hand_written import TRUE, UNTOLD, ZOO, Net, batches, truth

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


def rms(offsets: list[Tensor]) -> float:
    return torch.stack(offsets).square().mean().sqrt().item()


def statistics_of(layer: _BatchNorm) -> Tensor:
    return torch.stack([layer.running_mean, layer.running_var]).double()


def assert_gaps(observation: Observation, index: int, offsets: list[Tensor], rel: float = 2e-4) -> None:
    """Gaps are the root mean squares of some offsets, ``(2, C)`` each, of means and of variances."""
    for row, drift in enumerate((observation.means, observation.variances)):
        assert drift.gap[index].item() == pytest.approx(rms([o[row] for o in offsets]), rel=rel)


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


@pytest.mark.parametrize("name", TRUE)
def test_gaps_are_those_of_what_the_layer_normalized(name: str) -> None:
    net = Net(ZOO[name]).train()
    observer = Observer(find_bn(net))
    for _ in range(2):
        observation, offsets = observe(net, observer)
        assert ("bn" not in observation.direct) == (name in RECOVERED)
        for index, of_layer in enumerate(offsets.values()):
            assert_gaps(observation, index, of_layer)


SEEN_IN_PART = {"by hand, masked"}
"""Where the first batch has no padding, and is normalized as by torch: recovered from then on."""


@pytest.mark.parametrize("name", UNTOLD)
def test_a_layer_that_cannot_be_seen_is_marked_and_left_out_and_the_others_have_their_gaps(name: str) -> None:
    net = Net(ZOO[name]).train()
    observation, _ = observe(net, Observer(find_bn(net)))
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
LAYERS: dict[str, Callable[[int], _BatchNorm]] = {"torch's own": nn.BatchNorm1d, "a subclass": Subclass}


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


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("seed", range(5))
def test_calls_that_move_nothing_count_for_nothing_in_whatever_order_they_come(
    make: Callable[[int], _BatchNorm], seed: int
) -> None:
    random = Random(seed)
    layer = make(3)
    observer = Observer({"bn": layer})
    for _ in range(4):
        observer.before_batch()
        offsets = step(layer, random.choices(list(CALLS), k=random.randint(1, 4)))
        observer.after_batch()
        observation = observer.take()
        if offsets is None:
            assert observation.means.gap.isnan()
        else:
            assert_gaps(observation, 0, [offsets], rel=1e-3)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("later", ["tracked", "at momentum 0", "by flag", "in eval mode"])
@pytest.mark.parametrize("first", [["tracked"], ["tracked", "at momentum 0"]], ids="+".join)
def test_within_a_window_a_step_is_right_or_left_out(
    make: Callable[[int], _BatchNorm], first: list[str], later: str
) -> None:
    layer = make(3)
    observer = Observer({"bn": layer})
    offsets = []
    for kinds in (first, [later], [later, "tracked"], ["tracked"], first):
        observer.before_batch()
        offsets.append(step(layer, kinds))
        observer.after_batch()
    all_of_them = [o for o in offsets if o is not None]
    unknown = first == ["tracked"] and later in ("tracked", "at momentum 0") and make is nn.BatchNorm1d
    assert_gaps(observer.take(), 0, [o for o in all_of_them if not (unknown and o is offsets[2])], rel=1e-3)


def forecast_of(net: Net, steps: int = 40) -> StatisticsForecaster:
    """After steps that all see the same batch: the population is this batch."""
    forecast = StatisticsForecaster(find_bn(net))
    (x,) = batches([8])
    for _ in range(steps):
        forecast.before_batch()
        net(x)
        forecast.after_batch()
    return forecast


@pytest.mark.parametrize("name", ZOO)
def test_a_forecast_is_that_of_what_the_layer_normalized_or_the_layer_is_left_and_named(name: str) -> None:
    entry = ZOO[name]
    net = Net(entry).train()
    torch.manual_seed(1)
    forecast = forecast_of(net)
    torch.manual_seed(1)
    (x,) = batches([8])
    statistics, left = forecast.statistics(), forecast.left()
    assert not set(statistics) & set(left)
    if entry.given:
        assert ("bn" in statistics) == (name in RECOVERED)
    if name != "no counter":  # which is `not_recoverable` in the first place
        assert set(statistics) | set(left) == set(find_bn(net))
    for layer, rows in truth(net, [[x]]).items() if entry.given else ():
        if layer in statistics:
            torch.testing.assert_close(statistics[layer].mean, rows.mean(0), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(statistics[layer].var, rows.var(0), rtol=1e-3, atol=1e-3)
    if "bn" in left:
        assert left["bn"] == (CUSTOM_UPDATE if entry.given else UNMEASURABLE)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_forecast_takes_in_what_moved_the_layer_and_not_what_it_saw_besides(
    make: Callable[[int], _BatchNorm],
) -> None:
    layer = make(3)
    forecast = StatisticsForecaster({"bn": layer})
    x, other = torch.randn(64, 3) + 2, torch.randn(64, 3) * 4 - 3
    for _ in range(40):
        forecast.before_batch()
        for kind, input in zip(
            ("tracked", "at momentum 0", "by flag", "in eval mode"), (x, other, other, other), strict=True
        ):
            layer.training, layer.track_running_stats, layer.momentum = CALLS[kind]
            layer(input)
        layer.training, layer.track_running_stats, layer.momentum = CALLS["tracked"]
        forecast.after_batch()
    found = forecast.statistics()["bn"]
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.var, x.double().var(0), rtol=1e-3, atol=1e-3)
