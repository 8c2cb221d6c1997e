"""An observer says what the batches were, without having looked at them, and how far the EMA was off."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import find_bn
from lightning_bn.tracking.drift import Observation
from lightning_bn.tracking.observer import Observer
from tests.truth import recorded, rows_of
from tests.zoo import Shared, cnn, images

net = partial(cnn, dropout=0.0)  # two runs see the same


def observe(model: nn.Module, batches: Iterable[Tensor], observer: Observer | None = None) -> Observation:
    observer = observer or Observer(find_bn(model))
    for batch in batches:
        assert step(observer, model, batch)
    return observer.take()


def step(observer: Observer, model: Callable[[Tensor], Any], batch: Tensor) -> bool:
    observer.before_batch()
    model(batch)
    return observer.after_batch()


def offsets_from_truth(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Oracle: layer -> offsets of each batch from the EMA before it, ``(batches, 2, C)``, in float64."""
    model = copy.deepcopy(model)
    found: dict[str, list[Tensor]] = {name: [] for name in find_bn(model)}
    for batch in batches:
        layers = find_bn(model)
        ema = {n: (bn.running_mean.double().clone(), bn.running_var.double().clone()) for n, bn in layers.items()}
        with recorded(model) as calls:
            model(batch)
        for name, (mean, var) in ema.items():
            ((x, _),) = calls[name]
            rows = rows_of(x)
            found[name].append(torch.stack([(rows.mean(0) - mean) / var.sqrt(), (rows.var(0) / var).log()]))
    return {name: torch.stack(offsets) for name, offsets in found.items()}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_is(observation: Observation, truth: dict[str, Tensor], rel: float = 2e-4) -> None:
    """Gap, lag and noise of each layer are those of the true offsets."""
    for index, offsets in enumerate(truth.values()):
        for row, drift in enumerate((observation.means, observation.variances)):
            of_kind = offsets[:, row]
            assert drift.gap[index].item() == pytest.approx(rms(of_kind), rel=rel)
            assert drift.lag[index].item() == pytest.approx(rms(of_kind.mean(0)), rel=rel)
            assert drift.noise[index].item() == pytest.approx(rms(of_kind.std(0, correction=0)), rel=rel, abs=1e-5)


def untracked(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    layer.num_batches_tracked = None
    return layer


RECOVERED: dict[str, Callable[[], nn.Module]] = {
    "momentum 0.1": net,
    "momentum 1": lambda: net(nn.BatchNorm2d(8, momentum=1.0)),
    "momentum None": lambda: net(nn.BatchNorm2d(8, momentum=None)),
    "affine=False": lambda: net(nn.BatchNorm2d(8, affine=False)),
    "float64": lambda: net(nn.BatchNorm2d(8)).double(),
    "BatchNorm1d": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)),
}
DIRECT: dict[str, Callable[[], nn.Module]] = {
    "momentum 0": lambda: net(nn.BatchNorm2d(8, momentum=0.0)),
    "batches not tracked": lambda: net(untracked(nn.BatchNorm2d(8))),
    "frozen": lambda: net(nn.BatchNorm2d(8).eval()),
}
"""Layers that hide their batches, which are measured at the call."""


@pytest.mark.parametrize("name", [*RECOVERED, *DIRECT])
def test_gap_lag_and_noise_are_those_of_the_batches_that_were_never_looked_at(name: str) -> None:
    model = (RECOVERED | DIRECT)[name]()
    batches = [b.to(next(model.parameters()).dtype) for b in images(8, 8, 3, 5)]
    truth = offsets_from_truth(model, batches)
    observation = observe(model, batches)
    assert observation.direct == ({"1": name} if name in DIRECT else {})
    assert_is(observation, truth)


def test_a_layer_called_twice_counts_with_the_average_of_its_calls() -> None:
    model, (batch,) = Shared(), images(6)
    observer = Observer(find_bn(model), range(5))
    with recorded(model) as calls:
        observe(model, [batch], observer)
    first, second = (rows_of(x).mean(0) for x, _ in calls["bn"])
    expected = (0.09 * first + 0.1 * second) / 0.19
    assert torch.allclose(observer.traces.points[-1][1], expected, atol=1e-5)


def test_a_checkpointed_block_counts_once() -> None:
    """Though its layers are run a second time in the backward, which moves the running statistics twice."""
    model, (batch,) = net(), images(6)
    truth = offsets_from_truth(model, [batch])
    observer = Observer(find_bn(model))
    step(observer, lambda x: checkpoint(model, x, use_reentrant=False).sum().backward(), batch.requires_grad_())
    assert [int(bn.num_batches_tracked) for bn in find_bn(model).values()] == [2, 2]
    assert observer.take().means.gap[0].item() == pytest.approx(rms(truth["1"][0, 0]), rel=1e-4)


def test_16_bit_statistics_are_not_trusted() -> None:
    model, (batch,) = nn.Sequential(nn.BatchNorm2d(3)).bfloat16(), images(8)
    observer = Observer(find_bn(model), range(3))
    assert observe(model, [batch.bfloat16()], observer).direct == {"0": "16-bit statistics"}
    assert torch.allclose(observer.traces.points[-1][1], rows_of(batch.bfloat16()).mean(0), rtol=1e-5, atol=1e-6)


def test_a_momentum_that_changes_to_0_during_a_batch_gives_no_figure_and_no_alarm() -> None:
    layer = nn.BatchNorm1d(3)
    observer = Observer({"bn": layer})
    step(observer, lambda x: (setattr(layer, "momentum", 0.0), layer(x)), torch.randn(8, 3) + 1)
    observation = observer.take()
    assert observation.means.gap.isnan() and observation.nonfinite == 0 and observation.dead == 0


@pytest.mark.parametrize(("mean", "loaded", "before"), [(1e6, True, 0), (3e4, False, 59)])
def test_a_mean_of_many_sigma_is_measured_directly_if_loaded_or_seen_before(
    mean: float, loaded: bool, before: int
) -> None:
    layer, batches = nn.BatchNorm2d(3), images(*[16] * (before + 2), mean=mean)
    layer.running_mean.fill_(mean * loaded)
    observer = Observer({"bn": layer})
    observe(layer, batches[:before], observer)
    truth = offsets_from_truth(nn.Sequential(layer), batches[before:])
    observation = observe(layer, batches[before:], observer)
    assert observation.direct == {"bn": "mean of many sigma"}
    assert_is(observation, truth, rel=0.02)  # of an EMA that moves in steps of 0.06


def test_a_dead_channel_is_counted_and_does_not_hide_the_others() -> None:
    layer, alive = nn.BatchNorm1d(4), torch.tensor([1.0, 1, 1, 0])
    observe(layer, [torch.randn(16, 4) * alive for _ in range(149)])
    observation = observe(layer, [torch.randn(16, 4) * alive])
    assert observation.dead.item() == 0.25
    assert observation.means.gap.item() < 1 and observation.variances.gap.item() < 1


def test_a_nan_batch_is_counted_and_named_and_spoils_no_other_layer() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    observer = Observer(find_bn(model))
    step(observer, lambda x: (model[0](x), model[1](torch.randn(4, 2))), torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    observation = observer.take()
    assert observation.nonfinite.tolist() == [0.5, 0.0]
    assert observation.means.gap.isfinite().all()
    assert observation.aggregates()["nonfinite_layers"] == 1
    step(observer, model[0], torch.randn(4, 2))  # the EMA keeps its NaN, and batches can no longer be told from it
    assert observer.take().nonfinite.tolist() == [0.5, 0.0]


def test_a_layer_without_a_call_has_no_gap_and_the_others_have_theirs() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "idle": nn.BatchNorm1d(3)})
    observer = Observer(find_bn(model))
    aggregates = observer.take().aggregates()
    assert math.isnan(aggregates["mean_gap_max"]) and math.isnan(aggregates["worst_layer"])
    step(observer, model["used"], torch.randn(5, 3))
    observation = observer.take()
    assert observation.means.gap.isnan().tolist() == [False, True]
    assert observation.aggregates()["mean_gap_max"] == observation.means.gap[0]
    assert observation.aggregates()["worst_layer"] == 0


def test_it_is_invisible_in_compiled_models() -> None:
    plain = net(nn.BatchNorm2d(8, momentum=0.0))
    observed, (batch,) = copy.deepcopy(plain), images(4)
    expected = torch.compile(plain, backend="eager")(batch)
    compiled, observer = torch.compile(observed, backend="eager"), Observer(find_bn(observed))
    step(observer, lambda x: torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0), batch)
    assert observer.take().means.gap.isnan().tolist() == [True, False]
