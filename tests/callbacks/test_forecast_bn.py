"""ForecastBNCallback: what it writes and refuses; and `skip_below` of PreciseBNCallback, which uses the forecast."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import ForecastBNCallback, FromLoader, PreciseBNCallback
from tests.callbacks.zoo import (
    Evaluated,
    Images,
    Passes,
    TinyNet,
    digest,
    fit,
    loaded,
    statistics_of,
    train_loader,
    validation_loss,
)
from tests.ranks import run_on_ranks


class Learning(TinyNet):
    """Trains with a given learning rate, 0 by default, and counts its training steps."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.lr, self.forwards = lr, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.forwards += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def one_batch(times: int = 6) -> DataLoader[Any]:
    """The same batch over and over: with fixed weights, the population is this batch."""
    return DataLoader(torch.utils.data.ConcatDataset([Images(8)] * times), 8)


def close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> bool:
    return all(torch.allclose(found[name], truth[name], rtol=tolerance, atol=tolerance) for name in truth)


@pytest.mark.parametrize(
    "trainer",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"val_check_interval": 3}],
    ids=["plainly", "accumulation", "bf16-mixed", "mid-epoch validation"],
)
def test_of_fixed_weights_it_writes_what_a_pass_would_and_the_ema_has_not(trainer: dict[str, Any]) -> None:
    module = Learning()
    fit(module, ForecastBNCallback(), one_batch(), max_epochs=1, **trainer)
    plain, passed = Learning(), Learning()
    fit(plain, [], one_batch(), max_epochs=1, **trainer)
    fit(passed, PreciseBNCallback(8), one_batch(), max_epochs=1, **trainer)
    truth = statistics_of(passed)
    assert close(statistics_of(module), truth, 0.02), "a batch's own variance is unbiased, by one part in 63 or more"
    assert not close(statistics_of(plain), truth, 0.1)


def test_the_model_is_run_in_training_steps_only() -> None:
    module = Learning(0.1)
    callback = ForecastBNCallback()
    passes = Passes(callback)
    fit(module, [callback, passes], one_batch(6), max_epochs=3)
    assert module.forwards == 18
    assert passes.seen == [("validation", 6), ("validation", 12), ("validation", 18)]
    assert callback.result is not None and callback.result.num_samples == 0


def test_a_saved_model_reproduces_the_metric_that_was_logged() -> None:
    evaluated = Evaluated()
    fit(Learning(0.5), [ForecastBNCallback(), evaluated], max_epochs=2)
    for state, metrics in zip(evaluated.states, evaluated.metrics, strict=True):
        assert validation_loss(loaded(state)) == pytest.approx(metrics["val_loss"], rel=1e-5)


def test_without_validation_it_is_written_before_the_epochs_checkpoints() -> None:
    callback = ForecastBNCallback()
    passes = Passes(callback)
    fit(Learning(0.1), [callback, passes], one_batch(), None, max_epochs=2)
    assert passes.seen == [("epoch end", 6), ("epoch end", 12)]


class Writes(Callback):
    """Overwrites running statistics after every validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            pl_module.bn1.running_mean.fill_(50.0)


def test_statistics_written_between_steps_do_not_change_the_forecast() -> None:
    """A step's batch is recovered from the statistics before *that* step: of fixed weights, the forecast stays."""
    written = []
    for others in ([], [Writes()]):
        evaluated = Evaluated()
        fit(Learning(), [ForecastBNCallback(), evaluated, *others], one_batch(12), max_epochs=3)
        written.append(evaluated.states[-1]["bn1.running_mean"])
    assert torch.allclose(*written, atol=1e-3)


class PoisonedOnce(Callback):
    """Writes NaN into the statistics, as a batch with NaN does."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (0, 4):
            with torch.no_grad():
                pl_module.bn1.running_mean.fill_(torch.nan)


def test_running_statistics_that_a_nan_has_poisoned_are_replaced() -> None:
    module = Learning()
    fit(module, [PoisonedOnce(), ForecastBNCallback()], one_batch(6), max_epochs=1)
    assert all(value.isfinite().all() for value in statistics_of(module).values())


# ----------------------------------------------------------------------------------- layers without a forecast
def messages_of(*arguments: Any, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(*arguments, **kwargs)
    return [str(w.message) for w in caught if "ForecastBN" in str(w.message)]


def change(module: TinyNet, reason: str) -> TinyNet:
    if reason == "momentum 0":
        module.bn1.momentum = 0.0
    elif reason == "batches not tracked":
        module.bn1.num_batches_tracked = None
    return module


@pytest.mark.parametrize("reason", ["momentum 0", "batches not tracked"])
def test_a_layer_that_cannot_be_recovered_is_named_and_left_as_it_is(reason: str) -> None:
    module, plain = change(Learning(0.1), reason), change(Learning(0.1), reason)
    callback = ForecastBNCallback()
    messages = messages_of(module, callback)
    fit(plain)
    assert any(f"'bn1' ({reason})" in message for message in messages)
    assert callback.result is not None and list(callback.result) == ["bn2"]
    assert torch.equal(module.bn1.running_mean, plain.bn1.running_mean)
    assert not torch.equal(module.bn2.running_mean, plain.bn2.running_mean)


class FarOff(Learning):
    """The first layer's means are of some hundred thousand sigma."""

    def __init__(self) -> None:
        super().__init__(0.0)
        with torch.no_grad():
            self.bn1.running_mean.fill_(1e6)


def test_a_layer_with_means_of_too_many_sigma_is_named_and_left_as_it_is() -> None:
    callback = ForecastBNCallback()
    messages = messages_of(FarOff(), callback, max_epochs=1)
    assert any("'bn1' (means of many sigma)" in message for message in messages)
    assert callback.result is not None and list(callback.result) == ["bn2"]


def test_a_model_of_16_bit_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be recovered.*16-bit statistics.*use PreciseBNCallback"):
        fit(TinyNet(), ForecastBNCallback(), precision="bf16-true")


@pytest.mark.parametrize(
    ("make", "alternative"),
    [
        (ForecastBNCallback, "use PreciseBNCallback"),
        (lambda: PreciseBNCallback(skip_below=0.1), "leave out skip_below="),
    ],
)
def test_averaged_weights_are_refused_with_the_reason(make: Any, alternative: str) -> None:
    refused = f"WeightAveraging evaluates other weights than those that are trained.*{alternative}"
    with pytest.raises(ValueError, match=refused):
        fit(TinyNet(), [WeightAveraging(), make()])


@pytest.mark.parametrize("swapped", [False, True])
def test_two_estimators_of_one_layer_are_refused(swapped: bool) -> None:
    both = [PreciseBNCallback(8), ForecastBNCallback()]
    with pytest.raises(ValueError, match=r"act on layer 'bn1' \(2 in all\)"):
        fit(TinyNet(), both[::-1] if swapped else both)
    fit(TinyNet(), [PreciseBNCallback(8, layers="bn1"), ForecastBNCallback(layers="bn2")])


class ScheduleFree(torch.optim.SGD):
    """Swaps weights for evaluation, as schedule-free optimizers do."""

    def eval(self) -> None: ...


class ScheduledFreely(TinyNet):
    def configure_optimizers(self) -> Any:
        return ScheduleFree(self.parameters(), 0.1)


def test_schedule_free_optimizers_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="ScheduleFree evaluates other weights"):
        fit(ScheduledFreely(), ForecastBNCallback())


# ------------------------------------------------------------------------------------------------------- skip_below
def test_a_pass_is_run_while_the_ema_is_off_and_not_when_it_is_not() -> None:
    """Of fixed weights, the EMA of 24 steps is off by 8 % of its start, after a pass by nothing."""
    module, callback = Learning(), PreciseBNCallback(8, skip_below=0.05)
    passes = Passes(callback)
    fit(module, [callback, passes], one_batch(12), max_epochs=4)
    assert passes.seen == [("validation", 12)]


def test_a_skipped_pass_leaves_the_running_statistics_to_the_ema() -> None:
    module, plain = Learning(0.1), Learning(0.1)
    callback = PreciseBNCallback(8, skip_below=1e9)
    fit(module, callback)
    fit(plain)
    assert callback.result is None
    assert digest(module.state_dict()) == digest(plain.state_dict())


def test_without_a_forecast_the_pass_is_run() -> None:
    callback = PreciseBNCallback(8, skip_below=1e9)
    passes = Passes(callback)
    fit(Learning(0.1), [callback, passes], val_check_interval=1, max_epochs=1)
    assert passes.seen == [("validation", 1)], "a forecast needs two steps"


def test_before_a_test_the_pass_is_run_whatever_a_forecast_says() -> None:
    def given(trainer: Trainer) -> Any:
        return train_loader()

    module = Learning(0.1)
    callback = PreciseBNCallback(8, source=FromLoader(given), skip_below=1e9, stages=["test"])
    trainer = fit(module, callback)
    assert callback.result is None
    trainer.test(module, train_loader(), verbose=False)
    assert callback.result is not None


# ------------------------------------------------------------------------------------------------------------------ DDP
def forecast_on_rank(kind: Any, options: dict[str, Any], broadcast: bool) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    module, evaluated = Learning(0.1), Evaluated()
    callback = kind(**options)
    loader = train_loader(size=64, batch_size=4)
    strategy = DDPStrategy(broadcast_buffers=broadcast)
    fit(module, [callback, evaluated], loader, devices=2, strategy=strategy, max_epochs=2)
    return digest([{k: v for k, v in s.items() if "running" in k} for s in evaluated.states]), callback.result is None


@pytest.mark.ddp
@pytest.mark.parametrize("broadcast", [True, False])
def test_what_ranks_evaluate_is_identical(broadcast: bool) -> None:
    first, second = run_on_ranks(forecast_on_rank, 2, ForecastBNCallback, {}, broadcast)
    assert first == second
    assert not first[1]


@pytest.mark.ddp
def test_ranks_agree_on_whether_a_pass_is_needed() -> None:
    """Where each has running statistics of its own, and would decide on its own."""
    first, second = run_on_ranks(forecast_on_rank, 2, PreciseBNCallback, {"num_samples": 8, "skip_below": 0.3}, False)
    assert first[1] == second[1]


def test_resumed_with_other_layers_it_begins_anew_with_a_warning() -> None:
    callback = ForecastBNCallback()
    fit(TinyNet(), callback)
    state = callback.state_dict()

    class Widened(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            other.load_state_dict(state)

    class Wider(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.BatchNorm1d(3)

    other = ForecastBNCallback()
    assert any("begins a new forecast" in message for message in messages_of(Wider(), [Widened(), other]))
