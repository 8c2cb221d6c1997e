"""A pass that fails: once one has succeeded, and at FreezeBN's switch, it must not end a fit that would have run.

Each failure is compared, bit for bit, with a fit without that pass.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_bn import FreezeBNCallback, FromLoader, PassConfig, PreciseBNCallback
from tests.callbacks.test_laws import Blows
from tests.callbacks.zoo import TinyNet, caught, digest, fit, in_a_pass, statistics_of, train_loader
from tests.ranks import run_on_ranks


class Wanders(TinyNet):
    """Skips a layer for the first batch of later passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = float(next(iter(train_loader()))[0].sum())

    def features(self, x: Tensor) -> Tensor:
        skipped = in_a_pass(self) and self.trainer.current_epoch > 0 and float(x.sum()) == self.first
        x = self.conv1(x)
        x = self.conv2(x if skipped else self.bn1(x))
        return F.relu(self.bn2(x)).mean((2, 3))


def later(trainer: Trainer) -> bool:
    return trainer.current_epoch > 0


def dies(trainer: Trainer) -> Iterator[Any]:
    yield from list(train_loader())[: 1 if later(trainer) else 4]
    if later(trainer):
        raise OSError("disk gone")


def is_not_there(trainer: Trainer) -> Any:
    return next(iter([])) if later(trainer) else list(train_loader())


def is_empty(trainer: Trainer) -> Any:
    return [] if later(trainer) else list(train_loader())


def goes_round(module: TinyNet, batch: Any) -> Any:
    return batch if later(module.trainer) else module(batch[0])


IN_STEP = "batch 1 of the pass failed in training_step: "
NEEDS_GRADIENTS = RuntimeError("element 0 of tensors does not require grad")
FAILING: dict[str, tuple[Callable[[], TinyNet], dict[str, Any], str]] = {
    "training step": (lambda: Blows(ValueError("no good")), {}, f"{IN_STEP}no good"),
    "training step, replay": (lambda: Blows(KeyError("x")), {"source": "replay"}, f"{IN_STEP}KeyError: 'x'"),
    "one by one": (lambda: Blows(ValueError("none")), {"normalization_batch_size": "loader"}, f"{IN_STEP}none"),
    "needs gradients": (lambda: Blows(NEEDS_GRADIENTS), {}, f"{IN_STEP}Blows.training_step needs gradients itself"),
    "StopIteration": (lambda: Blows(StopIteration()), {}, f"{IN_STEP}StopIteration"),
    "loader": (TinyNet, {"source": FromLoader(dies)}, "batch 1 of the pass could not be read: OSError: disk gone"),
    "loader's function": (TinyNet, {"source": FromLoader(is_not_there)}, "StopIteration"),
    "no batch": (TinyNet, {"source": FromLoader(is_empty)}, "No batch reached a BatchNorm layer"),
    "no layer": (TinyNet, {"forward": goes_round}, "No batch reached a BatchNorm layer"),
    "lockstep": (Wanders, {"normalization_batch_size": 32}, "bn1"),
}


def on_error(do: str, callback: Any) -> Any:
    callback.on_error = do
    return callback


class FirstOnly(PreciseBNCallback):
    def should_run(self, trainer: Trainer) -> bool:
        return not later(trainer)


@pytest.mark.parametrize(("name", "val"), [*((name, "default") for name in FAILING), ("training step", None)])
def test_a_pass_that_fails_later_changes_nothing_or_raises(name: str, val: Any) -> None:
    make, options, message = FAILING[name]
    options = {"num_samples": 32, **options}
    module, precise = make(), PreciseBNCallback(**options)
    with caught("BNCallback") as said:
        trainer = fit(module, precise, val=val, max_epochs=3)
    without, first_only = make(), FirstOnly(**options)
    fit(without, first_only, val=val, max_epochs=3)
    assert digest(module.state_dict()) == digest(without.state_dict())
    assert digest([s.mean for s in precise.result.values()]) == digest([s.mean for s in first_only.result.values()])
    assert list(trainer.logger.logged("precise_bn/failed").values()) == [1, 2]
    (warning,) = said  # two passes failed, for one cause
    assert warning.startswith("PreciseBNCallback: a pass failed") and message in warning
    assert "on_error='raise'" in warning
    with pytest.raises(Exception) as raised:
        fit(make(), on_error("raise", PreciseBNCallback(**options)), val=val)
    assert str(raised.value).startswith("PreciseBNCallback: ") and message in str(raised.value)


class TwoCauses(Blows):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.error = ValueError(f"cause {'AB'[self.trainer.current_epoch % 2]} at {torch.rand(())}")
        return super().training_step(batch, batch_idx)


def test_each_cause_is_warned_of_once() -> None:
    with caught("BNCallback") as said:
        trainer = fit(TwoCauses(ValueError()), PreciseBNCallback(32), max_epochs=4)
    assert [("cause B" in s, "cause A" in s) for s in said] == [(True, False), (False, True)]
    assert max(trainer.logger.logged("precise_bn/failed").values()) == 3


@pytest.mark.parametrize("do", ["warn", "raise"])
def test_an_error_of_the_first_pass_is_raised_with_its_place(do: str) -> None:
    OwnError = type("OwnError", (Exception,), {})
    with pytest.raises(OwnError, match=r"^PreciseBNCallback: batch 1 of the pass failed in training_step: mine$"):
        fit(Blows(OwnError("mine"), after=0), on_error(do, PreciseBNCallback(32)))
    with pytest.raises(RuntimeError, match=r"^PreciseBNCallback: .* KeyError: 'x'$") as raised:
        fit(Blows(KeyError("x"), after=0), on_error(do, PreciseBNCallback(32)))
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_resumed_fit_remembers_that_a_pass_has_succeeded(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(Blows(ValueError("no good"), after=2), [PreciseBNCallback(32), saving], max_epochs=2)
    module, checkpoint = Blows(ValueError("no good"), after=2), tmp_path / "epoch=1.ckpt"
    with caught("BNCallback") as said:
        resumed = fit(module, PreciseBNCallback(32), max_epochs=3, ckpt_path=checkpoint)
    assert resumed.logger.logged("precise_bn/failed") == {11: 1.0} and len(said) == 1


# a replay at the switch holds only batches of training
@pytest.mark.parametrize("name", [n for n in FAILING if n not in ("lockstep", "training step, replay")])
def test_a_switch_whose_pass_fails_freezes_the_running_statistics(name: str) -> None:
    make, options, message = FAILING[name]
    config = PassConfig(32, **options)
    module, freezing = make(), FreezeBNCallback(start_epoch=1, precise=config)
    with caught("BNCallback") as said:
        trainer = fit(module, freezing)
    plain = make()
    fit(plain, FreezeBNCallback(start_epoch=1, statistics="ema"))
    assert digest(module.state_dict()) == digest(plain.state_dict())
    assert trainer.logger.logged("freeze_bn/failed") == {4: 1.0}
    (warning,) = [s for s in said if "pass failed" in s]
    assert warning.startswith("FreezeBNCallback: a pass failed, so the running statistics are frozen as they are")
    assert message in warning
    with pytest.raises(Exception, match=r"^FreezeBNCallback: "):
        fit(make(), on_error("raise", FreezeBNCallback(start_epoch=1, precise=config)))


def dies_on_rank_1(trainer: Trainer) -> Iterator[Any]:
    for number, batch in enumerate(train_loader(64)):
        if later(trainer) and trainer.global_rank == 1 and number > 1:
            raise OSError("disk gone")
        yield batch


class BlowsOnRank1(Blows):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.after = 1 if self.global_rank == 1 else 10
        return super().training_step(batch, batch_idx)


def fit_on_rank(case: str, do: str, size: Any) -> dict[str, Any]:
    module: TinyNet = TinyNet() if case == "loader" else BlowsOnRank1(ValueError("no good"))
    options = {"source": FromLoader(dies_on_rank_1, shard=False)} if case == "loader" else {}
    precise = on_error(do, PreciseBNCallback(40, normalization_batch_size=size, **options))
    error = ""
    with caught("BNCallback") as said:
        try:
            fit(module, precise, train_loader(64, 4), devices=2, strategy="ddp")
        except Exception as raised:
            error = str(raised)
    return {"statistics": digest(statistics_of(module)), "said": said, "error": error, "state": precise.state_dict()}


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("case", "size", "do"),
    [("loader", "auto", "warn"), ("loader", "loader", "raise"), ("step", "auto", "raise"), ("step", "loader", "warn")],
)
def test_ranks_agree_that_a_pass_failed_on_one_of_them(case: str, size: Any, do: str) -> None:
    first, second = run_on_ranks(fit_on_rank, 2, case, do, size)
    cause = "disk gone" if case == "loader" else "no good"
    assert first["state"] == second["state"]
    if do == "raise":
        assert "Another rank failed in the pass" in first["error"] and cause in second["error"]
    else:
        assert first["statistics"] == second["statistics"]
        assert first["state"]["passes"] == {"succeeded": True, "count": 1}
        assert "Another rank failed" in first["said"][0] and cause in second["said"][0]
