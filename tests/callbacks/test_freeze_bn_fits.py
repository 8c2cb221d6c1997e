"""FreezeBNCallback in whole fits: resumed, interrupted, with other callbacks and ranks; its warnings and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bn import PreciseBNCallback
from tests.callbacks import test_freeze_bn as parts
from tests.callbacks.test_freeze_bn import EPOCH, Configured, Watch, freeze, is_statistic, snapshot
from tests.callbacks.zoo import At, TinyNet, digest, fit, said, train_loader
from tests.ranks import run_on_ranks

pytestmark = parts.pytestmark


class CallsModes(TinyNet):
    def on_train_batch_end(self, *_: Any) -> None:
        assert self.bn1.training  # each layer reports the mode that the user has set

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.eval(), self.train(), self.bn1.eval(), self.bn1.train()

    def on_validation_model_train(self) -> None:
        self.train()

    def on_validation_model_eval(self) -> None:
        self.eval()


def assert_kept(statistics: dict[str, Tensor], watch: Watch) -> None:
    """Every statistic is that of the switch."""
    assert all(torch.equal(watch.started[EPOCH][k], v) for k, v in statistics.items() if is_statistic(k))


def test_train_and_eval_calls_do_not_thaw() -> None:
    watch, module = Watch(), CallsModes()
    fit(module, [freeze(), watch], max_epochs=3, val_check_interval=0.5)
    assert watch.frozen == [False] * 4 + [True] * 8
    assert_kept(snapshot(module), watch)


def test_batches_that_cannot_be_counted_do_not_end_a_fit_without_a_pass() -> None:
    class FromLists(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.tensor(batch)).square().mean()

    watch = Watch()
    batches = DataLoader([x.tolist() for x, _ in train_loader()], batch_size=None)
    fit(FromLists(), [freeze(statistics="ema"), watch], train=batches, val=None)
    assert watch.frozen == [False] * 4 + [True] * 4


def test_lbfgs_is_refused_before_training_if_it_holds_the_affine() -> None:
    module, watch = Configured(lambda m: torch.optim.LBFGS(m.parameters())), Watch()
    with pytest.raises(TypeError, match="LBFGS"):
        fit(module, [freeze(affine=True), watch])
    assert not watch.started


@pytest.mark.parametrize("when", [{"last_n_epochs": 1}, {"start_fraction": 0.5}])
def test_an_endless_fit_has_no_last_epochs(when: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pass start_epoch or start_step"):
        fit(TinyNet(), freeze(**when), max_epochs=-1)


@pytest.mark.parametrize("freeze_first", [True, False])
def test_precise_bn_runs_until_the_switch_and_then_warns_once(freeze_first: bool) -> None:
    watch, module, precise = Watch(), TinyNet(), PreciseBNCallback(20)
    ours: list[Callback] = [freeze(), precise] if freeze_first else [precise, freeze()]
    found = said("all of its layers are frozen", module, [*ours, watch], max_epochs=4, val_check_interval=0.5)
    assert watch.frozen == [False] * 4 + [True] * 12
    assert_kept(snapshot(module), watch)
    assert precise.result is not None and len(found) == 1, "a pass in the first epoch"


def test_with_weight_averaging_the_trained_weights_keep_their_frozen_statistics() -> None:
    watch, module = Watch(), TinyNet()
    fit(module, [WeightAveraging(), freeze(), watch], max_epochs=3)
    assert watch.frozen == [False] * 4 + [True] * 8
    assert_kept(watch.ended[-1], watch)


def _fit_on_ranks() -> tuple[Any, ...]:
    """Each rank has two of the four batches of an epoch; the switch comes at the second epoch."""
    watch, batches, module = Watch(), [], TinyNet()
    callback = freeze(start_step=2, num_samples=32, affine=True)
    note = At(lambda trainer, module, batch, _: batches.append(batch), "on_train_batch_start")
    fit(module, [callback, watch, note], max_epochs=3, devices=2, strategy="ddp")
    return [snapshot(module), watch.started[2], watch.frozen], watch.rates_in_step, batches[2:4]


@pytest.mark.ddp
def test_ranks_freeze_together_with_the_statistics_of_all_ranks_data() -> None:
    (found, in_step, batches), (found_there, _, batches_there) = run_on_ranks(_fit_on_ranks, 2)
    assert digest(found_there) == digest(found)
    _, at_switch, frozen = found
    assert frozen == [False] * 2 + [True] * 4
    assert [rate / 0.1 for (rate,) in in_step] == pytest.approx([1, 1, 0.5, 1, 1, 1])
    module = TinyNet()
    module.load_state_dict(at_switch)
    parts.assert_exact(module, batches + batches_there)
