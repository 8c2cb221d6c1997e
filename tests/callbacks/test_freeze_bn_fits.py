"""FreezeBNCallback in whole fits: resumed, interrupted, with other callbacks and ranks; its warnings and refusals."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_bn import FreezeBNCallback, PreciseBNCallback
from tests.callbacks import test_freeze_bn as parts
from tests.callbacks import zoo
from tests.callbacks.test_freeze_bn import EPOCH, Configured, Watch, freeze, is_statistic, is_thawed, rates, snapshot
from tests.callbacks.zoo import At, TinyNet, caught, digest, fit, said, train_loader, trainer_with, val_loader
from tests.ranks import run_on_ranks

pytestmark = parts.pytestmark


def run_to_the_end(
    checkpoints: Path | None, callback: FreezeBNCallback, ckpt_path: Path | None = None, **kwargs: Any
) -> tuple[TinyNet, Watch, list[int]]:
    """The module, what was seen of it, and the steps at which a pass ran."""
    module, watch = Configured(parts.adamw, lambda o: schedulers.CosineAnnealingLR(o, T_max=12)), Watch()
    callbacks: list[Callback] = [callback, watch]
    if checkpoints is not None:
        callbacks.append(ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=1, save_top_k=-1))
    trainer = fit(
        module,
        callbacks,
        train=zoo.equal_batches(),
        val=None,
        max_epochs=3,
        enable_checkpointing=checkpoints is not None,
        ckpt_path=ckpt_path,
        **kwargs,
    )
    passes = [step for step, row in trainer.logger.rows if "freeze_bn/seconds" in row]  # type: ignore[union-attr]
    return module, watch, passes


@pytest.mark.parametrize("when", [{"start_step": 5}, {"last_n_epochs": 1}, {"start_fraction": 0.5}])
def test_a_resumed_fit_ends_as_the_uninterrupted_one_without_a_second_pass_or_warning(when: Any, tmp_path: Any) -> None:
    """From checkpoints before, at and after the switch, within an epoch and at its end."""
    arguments = {"affine": True, "warmup_steps": 5, **when}
    uninterrupted, watched, (switch,) = run_to_the_end(tmp_path, freeze(**arguments))
    for step in (2, switch, switch + 1, 3 * EPOCH - 1):
        callback, checkpoint = freeze(**arguments), tmp_path / f"step={step}.ckpt"
        with caught("FreezeBNCallback") as warned:
            resumed, watch, passes = run_to_the_end(None, callback, checkpoint)
        assert passes == ([switch] if step <= switch else []), step
        assert step <= switch or not warned, step
        assert watch.rates_in_step == watched.rates_in_step[step:], step
        assert watch.frozen == watched.frozen[step:], step
        assert digest(snapshot(resumed)) == digest(snapshot(uninterrupted)), step
        saved = torch.load(checkpoint, weights_only=True)["callbacks"].get(callback.state_key)
        done = {"step": switch, "warmup_steps": 5, "warmup_done": [step - switch]}
        assert saved == done if step > switch else not saved, step


class CallsModes(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.modes.append(self.bn1.training)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.eval()
        self.train()
        self.bn1.eval()
        self.bn1.train()

    def on_validation_model_train(self) -> None:
        self.train()

    def on_validation_model_eval(self) -> None:
        self.eval()

    def on_train_epoch_start(self) -> None:
        self.train()


def test_train_and_eval_calls_do_not_thaw() -> None:
    watch = Watch()
    module = CallsModes()
    fit(module, [freeze(), watch], max_epochs=3, val_check_interval=0.5)
    assert watch.frozen == [False] * 4 + [True] * 8
    assert all(torch.equal(watch.started[EPOCH][k], v) for k, v in snapshot(module).items() if is_statistic(k))
    assert module.modes == [True] * 12  # each layer reports the mode that the user has set


class Interrupts(TinyNet):
    """Raises in the training step of a batch, which is within the optimizer's step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 5:
            raise ValueError("by the test")
        return super().training_step(batch, batch_idx)


def test_an_exception_thaws_and_leaves_no_rate_scaled() -> None:
    module, watch = Interrupts(lr=0.5), Watch()
    trainer = trainer_with([freeze(), watch])
    with pytest.raises(ValueError, match="by the test"):
        trainer.fit(module, train_loader(), val_loader())
    assert watch.rates_in_step[-1] == [0.25]  # it came in the middle of the warm-up
    assert is_thawed(module)
    assert [rates(o) for o in trainer.optimizers] == [[0.5]]


def test_a_second_fit_of_the_same_trainer_starts_unfrozen() -> None:
    callback, watch = freeze(start_step=6), Watch()
    trainer = fit(TinyNet(), [callback, watch])
    assert watch.frozen == [False] * 6 + [True] * 2
    trainer.fit_loop.max_epochs = 4  # it goes on from step 8
    callback.switch_point = dataclasses.replace(callback.switch_point, start_step=10)
    trainer.fit(TinyNet(), train_loader(), val_loader())
    assert watch.frozen[8:] == [False] * 2 + [True] * 6


def test_batches_that_cannot_be_counted_do_not_end_a_fit_without_a_pass() -> None:
    class FromLists(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.tensor(batch)).square().mean()

    watch = Watch()
    batches = DataLoader([x.tolist() for x, _ in train_loader()], batch_size=None)
    fit(FromLists(), [freeze(statistics="ema"), watch], train=batches, val=None)
    assert watch.frozen == [False] * 4 + [True] * 4


def test_it_warns_if_the_user_has_frozen_all_layers() -> None:
    class Frozen(TinyNet):
        def on_train_start(self) -> None:
            self.bn1.eval()
            self.bn2.eval()

    with pytest.warns(UserWarning, match="freezes the running statistics as they are: all of its layers are frozen"):
        fit(Frozen(), freeze(start_step=2))


def test_lbfgs_is_refused_before_training_if_it_holds_the_affine() -> None:
    module, watch = Configured(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2)), Watch()
    with pytest.raises(TypeError, match="LBFGS"):
        fit(module, [freeze(affine=True), watch])
    assert not watch.started


@pytest.mark.parametrize("when", [{"last_n_epochs": 1}, {"start_fraction": 0.5}])
def test_an_endless_fit_has_no_last_epochs(when: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pass start_epoch or start_step"):
        fit(TinyNet(), freeze(**when), max_epochs=-1)


@pytest.mark.parametrize("freeze_first", [True, False])
def test_precise_bn_runs_until_the_switch_and_then_warns_once(freeze_first: bool) -> None:
    watch = Watch()
    precise = PreciseBNCallback(20)
    ours: list[Callback] = [freeze(), precise] if freeze_first else [precise, freeze()]
    module = TinyNet()
    found = said("all of its layers are frozen", module, [*ours, watch], max_epochs=4, val_check_interval=0.5)
    assert watch.frozen == [False] * 4 + [True] * 12
    assert all(torch.equal(watch.started[EPOCH][k], v) for k, v in snapshot(module).items() if is_statistic(k))
    assert precise.result is not None  # of the first epoch
    assert len(found) == 1


def test_with_weight_averaging_the_trained_weights_keep_their_frozen_statistics() -> None:
    watch, module = Watch(), TinyNet()
    fit(module, [WeightAveraging(), freeze(), watch], max_epochs=3)
    assert watch.frozen == [False] * 4 + [True] * 8
    assert all(torch.equal(watch.started[EPOCH][k], v) for k, v in watch.ended[-1].items() if is_statistic(k))
    assert is_thawed(module)


def _fit_on_ranks() -> tuple[Any, ...]:
    """Each rank has two of the four batches of an epoch; the switch comes at the second epoch."""
    watch, batches, module = Watch(), [], Configured(parts.adamw)
    callback = freeze(start_step=2, num_samples=32, affine=True)
    note = At(lambda trainer, module, batch, _: batches.append(batch), "on_train_batch_start")
    fit(module, [callback, watch, note], max_epochs=3, devices=2, strategy="ddp")
    assert is_thawed(copy.deepcopy(module))
    return [snapshot(module), watch.started[2], watch.frozen], watch.rates_in_step, batches[2:4]


@pytest.mark.ddp
def test_ranks_freeze_together_with_the_statistics_of_all_ranks_data() -> None:
    (found, in_step, batches), (found_there, _, batches_there) = run_on_ranks(_fit_on_ranks, 2)
    assert digest(found_there) == digest(found)
    _, at_switch, frozen = found
    assert frozen == [False] * 2 + [True] * 4
    assert [rate / 0.02 for (rate,) in in_step] == pytest.approx([1, 1, 0.5, 1, 1, 1])
    module = TinyNet()
    module.load_state_dict(at_switch)
    parts.assert_exact(module, batches + batches_there)
