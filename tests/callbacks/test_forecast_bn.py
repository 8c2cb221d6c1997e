"""ForecastBNCallback: what it writes and refuses; and `skip_below` of PreciseBNCallback, which uses the forecast."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_bn import ForecastBNCallback, FromLoader, PreciseBNCallback
from tests.callbacks import zoo
from tests.callbacks.zoo import At, Evaluated, Passes, TinyNet, digest, equal_batches, fit, said, statistics_of
from tests.ranks import run_on_ranks


class Learning(TinyNet):
    """Trains with a given learning rate, without momentum; of fixed weights, the population is a batch that repeats."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr=lr)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> bool:
    return all(torch.allclose(found[name], truth[name], rtol=tolerance, atol=tolerance) for name in truth)


@pytest.mark.parametrize(
    "trainer",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"val_check_interval": 3}],
    ids=["plainly", "accumulation", "bf16-mixed", "mid-epoch validation"],
)
def test_of_fixed_weights_it_writes_what_a_pass_would_and_the_ema_has_not(trainer: dict[str, Any]) -> None:
    module = Learning()
    fit(module, ForecastBNCallback(), equal_batches(6), max_epochs=1, **trainer)
    plain, passed = Learning(), Learning()
    fit(plain, [], equal_batches(6), max_epochs=1, **trainer)
    fit(passed, PreciseBNCallback(8), equal_batches(6), max_epochs=1, **trainer)
    truth = statistics_of(passed)
    assert close(statistics_of(module), truth, 0.02), "a batch's own variance is unbiased, by one part in 63 or more"
    assert not close(statistics_of(plain), truth, 0.1)


def test_it_is_written_before_validations_and_epochs_checkpoints_and_the_model_is_run_in_training_steps_only() -> None:
    for val, moment in (("default", "validation"), (None, "epoch end")):
        module, callback = Learning(0.1), ForecastBNCallback()
        passes = Passes(callback)
        fit(module, [callback, passes], equal_batches(6), val)
        assert len(module.losses) == 12
        assert passes.seen == [(moment, 6), (moment, 12)]
        assert callback.result is not None and callback.result.num_samples == 0


WITHOUT: dict[str, Any] = {
    "momentum 0": lambda module: setattr(module.bn1, "momentum", 0.0),
    "batches not tracked": lambda module: setattr(module.bn1, "num_batches_tracked", None),
    "means of many sigma": lambda module: module.bn1.running_mean.fill_(1e6),  # some hundred thousand
}


@pytest.mark.parametrize("reason", WITHOUT)
def test_a_layer_that_cannot_be_recovered_is_named_and_left_as_it_is(reason: str) -> None:
    module, plain, callback = Learning(0.1), Learning(0.1), ForecastBNCallback()
    WITHOUT[reason](module), WITHOUT[reason](plain)
    messages = said("ForecastBN", module, callback, max_epochs=1)
    fit(plain, max_epochs=1)
    assert any(f"'bn1' ({reason})" in message for message in messages)
    assert callback.result is not None and list(callback.result) == ["bn2"]
    assert torch.equal(module.bn1.running_mean, plain.bn1.running_mean)
    assert not torch.equal(module.bn2.running_mean, plain.bn2.running_mean)


class ScheduleFree(torch.optim.SGD):
    """Swaps weights for evaluation, as schedule-free optimizers do."""

    def eval(self) -> None: ...


class ScheduledFreely(TinyNet):
    def configure_optimizers(self) -> Any:
        return ScheduleFree(self.parameters(), 0.1)


AVERAGED = "WeightAveraging evaluates other weights than those that are trained.*"


@pytest.mark.parametrize(
    ("module", "callbacks", "trainer", "refused"),
    [
        (TinyNet, [ForecastBNCallback()], {"precision": "bf16-true"}, r"16-bit statistics.*use PreciseBNCallback"),
        (TinyNet, [WeightAveraging(), ForecastBNCallback()], {}, f"{AVERAGED}use PreciseBNCallback"),
        (TinyNet, [WeightAveraging(), PreciseBNCallback(skip_below=0.1)], {}, f"{AVERAGED}leave out skip_below="),
        (ScheduledFreely, [ForecastBNCallback()], {}, "ScheduleFree evaluates other weights"),
    ],
    ids=["16 bit", "averaged weights", "averaged weights, skip_below", "schedule-free"],
)
def test_a_model_whose_statistics_cannot_be_forecast_is_refused_with_the_reason(
    module: Any, callbacks: Any, trainer: Any, refused: str
) -> None:
    with pytest.raises(ValueError, match=refused):
        fit(module(), callbacks, **trainer)


def test_a_pass_is_run_while_the_ema_is_off_and_not_when_it_is_not() -> None:
    """Of fixed weights, the EMA of 24 steps is off by 8 % of its start, after a pass by nothing."""
    callback = PreciseBNCallback(8, skip_below=0.05)
    passes = Passes(callback)
    fit(Learning(), [callback, passes], equal_batches(12), max_epochs=3)
    assert passes.seen == [("validation", 12)]
    callback = PreciseBNCallback(8, skip_below=1e9)
    passes = Passes(callback)
    fit(Learning(0.1), [callback, passes], val_check_interval=1, max_epochs=1)
    assert passes.seen == [("validation", 1)], "a forecast needs two steps"


def test_a_skipped_pass_leaves_the_running_statistics_to_the_ema() -> None:
    module, plain = Learning(0.1), Learning(0.1)
    callback = PreciseBNCallback(8, skip_below=1e9)
    fit(module, callback)
    fit(plain)
    assert callback.result is None
    assert digest(module.state_dict()) == digest(plain.state_dict())


def test_before_a_test_the_pass_is_run_whatever_a_forecast_says() -> None:
    own = FromLoader(lambda _: equal_batches())
    module, callback = Learning(0.1), PreciseBNCallback(8, source=own, skip_below=1e9, stages=["test"])
    trainer = fit(module, callback)
    assert callback.result is None
    trainer.test(module, equal_batches())
    assert callback.result is not None


def forecast_on_rank(kind: Any, options: dict[str, Any], broadcast: bool) -> Any:
    evaluated, callback = Evaluated(), kind(**options)
    strategy = DDPStrategy(broadcast_buffers=broadcast)
    fit(Learning(0.1), [callback, evaluated], zoo.train_loader(64, 4), devices=2, strategy=strategy)
    return digest([{k: v for k, v in s.items() if "running" in k} for s in evaluated.states]), callback.result is None


@pytest.mark.ddp
@pytest.mark.parametrize("broadcast", [True, False])
def test_what_ranks_evaluate_is_identical(broadcast: bool) -> None:
    first, second = run_on_ranks(forecast_on_rank, 2, ForecastBNCallback, {}, broadcast)
    assert first == second and not first[1]


@pytest.mark.ddp
def test_ranks_agree_on_whether_a_pass_is_needed() -> None:
    first, second = run_on_ranks(forecast_on_rank, 2, PreciseBNCallback, {"num_samples": 8, "skip_below": 0.3}, False)
    assert first[1] == second[1]


def test_resumed_with_other_layers_it_begins_anew_with_a_warning() -> None:
    callback, other = ForecastBNCallback(), ForecastBNCallback()
    fit(TinyNet(), callback, max_epochs=1)

    widened = At(lambda *_: other.load_state_dict(callback.state_dict()), "on_fit_start")
    assert said("begins a new forecast", zoo.Wider(), [widened, other], max_epochs=1)
