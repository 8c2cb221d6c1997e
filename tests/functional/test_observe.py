"""An observer says what the batches were, without having looked at them, and how far the EMA was off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_bn import find_bn, freeze_bn
from lightning_bn.tracking.drift import Observation
from lightning_bn.tracking.observer import Observer
from tests.truth import recorded, rows_of
from tests.zoo import Shared, cnn, images


def without_dropout(model: nn.Module) -> nn.Module:
    """So that two runs see the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def observe(model: nn.Module, batches: Iterable[Tensor], observer: Observer | None = None) -> Observation:
    """The observation of a training over ``batches``."""
    observer = observer or Observer(find_bn(model))
    for batch in batches:
        observer.before_batch()
        model(batch)
        assert observer.after_batch()
    return observer.take()


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
            rows = [rows_of(x) for x, _ in calls[name]]
            batch_mean, batch_var = (
                torch.stack(s).mean(0) for s in zip(*((r.mean(0), r.var(0)) for r in rows), strict=True)
            )
            found[name].append(torch.stack([(batch_mean - mean) / var.sqrt(), (batch_var / var).log()]))
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


class Checkpointed(nn.Module):
    """Runs its layers a second time in the backward, which moves the running statistics twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "momentum 0.1": cnn,
    "momentum 1": lambda: cnn(nn.BatchNorm2d(8, momentum=1.0)),
    "momentum None": lambda: cnn(nn.BatchNorm2d(8, momentum=None)),
    "affine=False": lambda: cnn(nn.BatchNorm2d(8, affine=False)),
    "float64": lambda: cnn(nn.BatchNorm2d(8)).double(),
    "BatchNorm1d": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gap_lag_and_noise_are_those_of_the_batches_that_were_never_looked_at(make: Callable[[], nn.Module]) -> None:
    model = without_dropout(make())
    batches = [b.to(next(model.parameters()).dtype) for b in images(8, 8, 3, 5)]
    truth = offsets_from_truth(model, batches)
    observation = observe(model, batches)
    assert not observation.direct
    assert_is(observation, truth)


def test_a_layer_called_twice_counts_with_the_average_of_its_calls() -> None:
    """Weighted as the EMA weighs them: the second call a little more."""
    model, (batch,) = Shared(), images(6)
    observer = Observer(find_bn(model), range(5))
    with recorded(model) as calls:
        observe(model, [batch], observer)
    first, second = (rows_of(x).mean(0) for x, _ in calls["bn"])
    expected = (0.09 * first + 0.1 * second) / 0.19
    assert torch.allclose(observer.traces.points[-1][1], expected, atol=1e-5)


def test_a_checkpointed_block_counts_once() -> None:
    model, (batch,) = without_dropout(Checkpointed()), images(6)
    truth = offsets_from_truth(model.net, [batch])
    observer = Observer(find_bn(model))
    observer.before_batch()
    model(batch.requires_grad_()).sum().backward()
    observer.after_batch()
    assert [int(bn.num_batches_tracked) for bn in find_bn(model).values()] == [2, 2]
    assert observer.take().means.gap[0].item() == pytest.approx(rms(truth["1"][0, 0]), rel=1e-4)


def test_an_ema_that_stands_still_lags_and_one_that_follows_does_not() -> None:
    torch.manual_seed(1)
    layer = nn.BatchNorm1d(64)
    still = [torch.randn(32, 64) for _ in range(150)]
    observe(layer, still[:100])
    following = observe(layer, still[100:])
    expected = 1 / math.sqrt(32) * math.sqrt(1 + 0.1 / 1.9)  # of a batch mean, and of the EMA
    assert following.means.noise.item() == pytest.approx(expected, rel=0.1)
    assert following.means.lag.item() < 0.1 * following.means.noise.item()
    ahead = observe(layer, [torch.randn(32, 64) + 0.1 * step for step in range(50)])
    assert ahead.means.lag.item() == pytest.approx(0.9, rel=0.15)  # a ramp of 0.1 a step: 0.1 (1 / m - 1) behind
    assert ahead.means.lag.item() > ahead.means.noise.item()


def stored_in_16_bit(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    layer.running_mean, layer.running_var = layer.running_mean.bfloat16(), layer.running_var.bfloat16()
    return layer


def untracked(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    layer.num_batches_tracked = None
    return layer


NOT_RECOVERED = {
    "momentum 0": lambda: nn.BatchNorm2d(8, momentum=0.0),
    "batches not tracked": lambda: untracked(nn.BatchNorm2d(8)),
    "frozen": lambda: nn.BatchNorm2d(8).eval(),
}


@pytest.mark.parametrize("reason", NOT_RECOVERED)
def test_a_layer_that_hides_its_batches_is_measured_directly_and_marked(reason: str) -> None:
    model, batches = without_dropout(cnn(NOT_RECOVERED[reason]())), images(8, 5, 3)
    truth = offsets_from_truth(model, batches)
    observation = observe(model, batches)
    assert observation.direct == {"1": reason}
    assert_is(observation, truth)


def test_16_bit_statistics_are_not_trusted() -> None:
    model, (batch,) = nn.Sequential(stored_in_16_bit(nn.BatchNorm2d(3))).bfloat16(), images(8)
    observer = Observer(find_bn(model), range(3))
    assert observe(model, [batch.bfloat16()], observer).direct == {"0": "16-bit statistics"}
    assert torch.allclose(observer.traces.points[-1][1], rows_of(batch.bfloat16()).mean(0), rtol=1e-5, atol=1e-6)


def test_a_mean_of_many_sigma_that_was_loaded_is_measured_directly_from_the_first_batch_on() -> None:
    layer, batches = nn.BatchNorm2d(3), images(16, 16, mean=1e6)
    layer.running_mean.fill_(1e6)
    truth = offsets_from_truth(nn.Sequential(layer), batches)
    observation = observe(layer, batches)
    assert list(observation.direct.values()) == ["mean of many sigma"]
    assert_is(observation, truth, rel=0.02)  # of an EMA that moves in steps of 0.06


def test_a_momentum_that_changes_to_0_during_a_batch_gives_no_figure_and_no_alarm() -> None:
    layer = nn.BatchNorm1d(3)
    observer = Observer({"bn": layer})
    observer.before_batch()
    layer.momentum = 0.0
    layer(torch.randn(8, 3) + 1)
    observer.after_batch()
    observation = observer.take()
    assert observation.means.gap.isnan() and observation.nonfinite == 0 and observation.dead == 0


def test_a_mean_of_many_sigma_is_measured_directly_from_the_next_window_on() -> None:
    layer, batches = nn.BatchNorm2d(3), images(*[16] * 60, mean=3e4)
    observer = Observer({"bn": layer})
    observe(layer, batches[:59], observer)
    truth = offsets_from_truth(nn.Sequential(layer), batches[59:])
    observation = observe(layer, batches[59:], observer)
    assert observation.direct == {"bn": "mean of many sigma"}
    assert_is(observation, truth)


def test_frozen_layers_show_how_far_the_data_are_from_the_frozen_statistics() -> None:
    layer = nn.BatchNorm1d(2)
    with freeze_bn(nn.Sequential(layer)):
        observation = observe(layer, [torch.randn(4000, 2) + 0.5])
    assert list(observation.direct.values()) == ["frozen"]
    assert observation.means.gap.item() == pytest.approx(0.5, abs=0.05)


def test_a_dead_channel_is_counted_and_does_not_hide_the_others() -> None:
    layer = nn.BatchNorm1d(4)
    batches = [torch.randn(16, 4) * torch.tensor([1.0, 1, 1, 0]) for _ in range(150)]
    observe(layer, batches[:149])
    observation = observe(layer, batches[149:])
    assert observation.dead.item() == 0.25
    assert observation.means.gap.item() < 1 and observation.variances.gap.item() < 1


def test_a_nan_batch_is_counted_and_named_and_spoils_no_other_layer() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    observer = Observer(find_bn(model))
    observer.before_batch()
    model[0](torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    model[1](torch.randn(4, 2))
    observer.after_batch()
    observation = observer.take()
    assert observation.nonfinite.tolist() == [0.5, 0.0]
    assert observation.means.gap.isfinite().all()
    assert observation.aggregates()["nonfinite_layers"] == 1
    observer.before_batch()
    model[0](torch.randn(4, 2))  # the EMA keeps its NaN, and batches can no longer be told from it
    observer.after_batch()
    assert observer.take().nonfinite.tolist() == [0.5, 0.0]


def test_a_layer_without_a_call_has_no_gap_and_the_others_have_theirs() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "idle": nn.BatchNorm1d(3)})
    observer = Observer(find_bn(model))
    observer.before_batch()
    model["used"](torch.randn(5, 3))
    observer.after_batch()
    observation = observer.take()
    assert observation.means.gap.isnan().tolist() == [False, True]
    assert observation.aggregates()["mean_gap_max"] == observation.means.gap[0]
    assert observation.aggregates()["worst_layer"] == 0


def test_nothing_measured_gives_nan_and_no_error() -> None:
    aggregates = Observer({"bn": nn.BatchNorm1d(3)}).take().aggregates()
    assert math.isnan(aggregates["mean_gap_max"]) and math.isnan(aggregates["worst_layer"])


def test_an_abandoned_batch_leaves_no_trace() -> None:
    layer = nn.BatchNorm1d(3, momentum=0.0)
    observer = Observer({"bn": layer})
    observer.before_batch()
    assert type(layer) is not nn.BatchNorm1d
    observer.abandon()
    assert type(layer) is nn.BatchNorm1d and not observer.after_batch() and observer.batches == 0


def test_a_window_goes_on_from_its_state() -> None:
    model, batches = without_dropout(cnn(nn.BatchNorm2d(8, momentum=0.0))), images(8, 5, 3, 4)
    twin = copy.deepcopy(model)
    whole = observe(model, batches)
    first, second = Observer(find_bn(twin)), Observer(find_bn(twin))
    for number, batch in enumerate(batches):
        observer = first if number < 2 else second
        observer.before_batch()
        twin(batch)
        observer.after_batch()
        if number == 1:
            second.load_state_dict(first.state_dict())
    resumed = second.take()
    for a, b in zip(whole.per_layer().values(), resumed.per_layer().values(), strict=True):
        assert torch.equal(a, b)
    assert resumed.direct == whole.direct


def test_a_measured_step_takes_few_operators_and_waits_for_nothing() -> None:
    """The arithmetic comes with the row."""

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(50)))
    observer = Observer(find_bn(model))
    for first in (True, False, False):
        with Operators() as before:
            observer.before_batch()
        model(torch.randn(8, 3))
        with Operators() as after:
            observer.after_batch()
        names = before.names + after.names
        assert first or (len(names) <= 4 and "aten::_local_scalar_dense" not in names)


def test_it_is_invisible_in_compiled_models() -> None:
    """Nothing is measured where it would change what is compiled; the layer that would need it has no figure."""
    plain = without_dropout(cnn(nn.BatchNorm2d(8, momentum=0.0)))
    observed = copy.deepcopy(plain)
    batches = images(4, 4)
    outputs = [torch.compile(plain, backend="aot_eager")(batch) for batch in batches]
    compiled, observer = torch.compile(observed, backend="aot_eager"), Observer(find_bn(observed))
    for batch, expected in zip(batches, outputs, strict=True):
        observer.before_batch()
        assert torch.equal(compiled(batch), expected)
        observer.after_batch()
    assert observer.take().means.gap.isnan().tolist() == [True, False]
