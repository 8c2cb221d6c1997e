"""BatchLeakageMonitor alarms on batches that were put together by a pattern, on no others, and logs what it finds."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchLeakageMonitor, FreezeBNCallback, GhostBNCallback, MiniBatchInferenceCallback
from lightning_bn.trainer.leakage_pass import BatchReservoir
from tests.callbacks import zoo
from tests.callbacks.zoo import (
    Passes,
    TinyNet,
    caught,
    digest,
    fit,
    loaded,
    raising,
    train_loader,
    trainer_with,
    val_loader,
)
from tests.ranks import run_on_ranks

KINDS = 128


def images_of_kinds() -> tuple[Tensor, Tensor]:
    """16 images of each of 128 kinds, sorted by kind."""
    own, kind = torch.Generator().manual_seed(0), torch.arange(KINDS).repeat_interleave(16)
    images = torch.randn(len(kind), 3, 6, 6, generator=own) + 2 * torch.randn(KINDS, 3, 1, 1, generator=own)[kind]
    return images, kind % 3


def batches(pattern: str) -> list[list[int]]:
    """An epoch in batches of 32: shuffled, in order, or 16 kinds x 2 each; or balanced, in batches of 128."""
    own = torch.Generator().manual_seed(1)
    if pattern == "16 x 2":
        kinds = [(i, k) for i in range(8) for k in torch.randperm(KINDS, generator=own).view(8, 16)]
        return [(16 * k.repeat_interleave(2) + torch.arange(2).repeat(16) + 2 * i).tolist() for i, k in kinds]
    if pattern == "balanced":
        return torch.arange(2048).view(KINDS, 16).T.reshape(16, KINDS).tolist()
    order = torch.randperm(2048, generator=own) if pattern == "shuffled" else torch.arange(2048)
    return order.view(64, 32).tolist()


def loader(pattern: str) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images_of_kinds()), batch_sampler=batches(pattern))


def warned(module: Any, callbacks: Any, *args: Any, **kwargs: Any) -> tuple[Trainer, list[str]]:
    with caught() as said:
        trainer = fit(module, callbacks, *args, **kwargs)
    return trainer, [m for m in said if "BatchLeakage" in m or m.startswith("Batches ")]


def test_a_pattern_alarms_within_one_epoch_and_then_it_rests() -> None:
    monitor = BatchLeakageMonitor()
    passes = Passes(monitor)
    trainer, said = warned(TinyNet(), [monitor, passes], loader("16 x 2"), val=None, max_epochs=2)
    assert monitor.alarmed and monitor.p_value <= 0.01
    assert len(said) == 1 and "Batches leak information: In epoch 0 the samples that layer 'bn" in said[0]
    (row,) = [row for _, row in trainer.loggers[0].rows if "batch_leakage/p_value" in row]
    assert set(row) == {f"batch_leakage/{k}" for k in ("p_value", "epoch_p_value", "icc_worst", "icc/bn1", "icc/bn2")}
    assert row["batch_leakage/p_value"] == monitor.p_value and row["batch_leakage/icc_worst"] > 0
    assert passes.seen == [("epoch end", 64)]
    assert monitor._evidence.epochs == 1 and monitor._pass._reservoir is None


def test_shuffled_batches_do_not_alarm_and_balanced_ones_do_and_are_called_so() -> None:
    monitor = BatchLeakageMonitor(1024)
    trainer, said = warned(TinyNet(), monitor, loader("shuffled"))
    assert not monitor.alarmed and said == []
    assert len(trainer.loggers[0].logged("batch_leakage/epoch_p_value")) == 2
    _, said = warned(TinyNet(), BatchLeakageMonitor(), loader("balanced"), val=None, max_epochs=1)
    assert len(said) == 1 and said[0].startswith("Batches are balanced")


def in_pattern(trainer: Trainer) -> Any:
    return val_loader(batch_size=3)


@pytest.mark.parametrize("layers", [None, "bn1"])
def test_the_three_errors_are_what_validation_would_log(layers: str | None) -> None:
    evaluated, monitor = zoo.Evaluated(), BatchLeakageMonitor(log_errors=True, same_pattern=in_pattern, layers=layers)
    module = TinyNet()
    trainer = fit(module, [monitor, evaluated], max_epochs=1, num_sanity_val_steps=2)
    assert len(trainer.loggers[0].logged("batch_leakage/population/val_loss")) == 1, "in the sanity check, too"
    trainer.validate(module, val_loader())
    assert len(trainer.loggers[0].logged("batch_leakage/population/val_loss")) == 1, "in an evaluation of the user's"
    evaluated.states.pop(), evaluated.metrics.pop()
    found = {k: v for _, row in trainer.loggers[0].rows for k, v in row.items() if k.startswith("batch_leakage/")}
    state = evaluated.states[-1]
    by_batch = MiniBatchInferenceCallback(layers=layers)
    for key, size, callbacks in (("population", 6, []), ("mini_batch", 6, by_batch), ("same_pattern", 3, by_batch)):
        (oracle,) = trainer_with(callbacks).validate(loaded(state), val_loader(batch_size=size))
        assert found[f"batch_leakage/{key}/val_loss"] == pytest.approx(oracle["val_loss"], rel=1e-5)
    assert found["batch_leakage/population/val_loss"] == pytest.approx(evaluated.metrics[-1]["val_loss"], rel=1e-6)
    assert "batch_leakage/population/val_loss" not in trainer.callback_metrics


def test_comparing_beside_mini_batch_inference_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no population"):
        fit(TinyNet(), [BatchLeakageMonitor(log_errors=True), MiniBatchInferenceCallback()])
    fit(TinyNet(), [BatchLeakageMonitor(log_errors=True), MiniBatchInferenceCallback(stages=["test"])])


class FailsInEval(TinyNet):
    """As one whose training step asks for a gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.bn1.training:
            raise ZeroDivisionError("in the step")
        return super().training_step(batch, batch_idx)


class NotFinite(TinyNet):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x if self.bn1.training else x * torch.nan)


TESTS_NOTHING: dict[str, tuple[Any, dict[str, Any], str]] = {
    "count raises": (
        TinyNet,
        {"batch_size_fn": raising(KeyError("size"))},
        "nothing in this epoch: .*KeyError: 'size'",
    ),
    "count gives no number": (TinyNet, {"batch_size_fn": str}, "batch_size_fn must return a batch's number of samples"),
    "too large": (TinyNet, {"num_samples": 8, "max_bytes": 4000}, r"keep up to 4 batches.*Raise max_bytes, or lower"),
    "the step raises": (FailsInEval, {}, "ZeroDivisionError: .*in the step"),
    "forward leaks a StopIteration": (TinyNet, {"forward": raising(StopIteration)}, "StopIteration"),
    "not finite": (NotFinite, {}, "There is nothing to compare"),
    "an empty loader": (TinyNet, {"log_errors": True, "same_pattern": lambda _: []}, "a loader without batches"),
}


@pytest.mark.parametrize(("make", "arguments", "message"), TESTS_NOTHING.values(), ids=TESTS_NOTHING)
def test_what_it_meets_in_a_fit_is_said_once_and_changes_nothing(make: Any, arguments: Any, message: str) -> None:
    watched, plain = make(), make()
    monitor = BatchLeakageMonitor(**arguments)
    trainer, said = warned(watched, monitor)
    fit(plain)
    assert trainer.global_step == 8 and len(said) == 1 and re.search(message, said[0])
    assert digest(watched.state_dict()) == digest(plain.state_dict())
    assert all(type(m) is type(n) for m, n in zip(watched.modules(), plain.modules(), strict=True))
    if "same_pattern" not in arguments:
        assert monitor.alarmed is None and math.isnan(monitor.p_value) and monitor.result is None


ERRORS = {"batch_size_fn": MemoryError(), "forward": KeyboardInterrupt(), "same_pattern": torch.OutOfMemoryError()}


@pytest.mark.parametrize(("where", "error"), ERRORS.items())
def test_what_is_not_ours_to_swallow_passes_and_leaves_nothing(error: BaseException, where: str) -> None:
    module = TinyNet()
    monitor = BatchLeakageMonitor(**{"log_errors": where == "same_pattern", where: raising(error)})
    with pytest.raises(BaseException) as raised:
        fit(module, monitor)
    assert raised.value is error or isinstance(error, KeyboardInterrupt)  # which Lightning makes an exit of
    assert all(type(m) is type(n) for m, n in zip(module.modules(), TinyNet().modules(), strict=True))


def test_a_layer_whose_rows_are_not_its_samples_is_named_once_and_the_others_are_tested() -> None:
    class Ragged(TinyNet):
        def features(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(self.bn1(self.conv1(torch.cat([x, x[:3]])))[: len(x)])).mean((2, 3))

    monitor = BatchLeakageMonitor()
    _, said = warned(Ragged(), monitor)
    assert len(said) == 1 and "Layer 'bn1' is left out: 11 rows of 8 samples" in said[0]
    assert set(monitor.result.icc) == {"bn2"}


def test_it_advises_no_callback_that_is_there() -> None:
    for callbacks, ghosts in (([], True), ([GhostBNCallback(size=16, grouping="contiguous")], False)):
        _, said = warned(TinyNet(), [BatchLeakageMonitor(512), *callbacks], loader("in order"), val=None, max_epochs=1)
        assert ("GhostBNCallback" in said[0]) is ghosts and "FreezeBNCallback" in said[0]


def test_an_epoch_of_one_batch_and_frozen_layers_are_warned_of_once() -> None:
    frozen = FreezeBNCallback(start_step=0, statistics="ema")
    for others, loader, message in (([], train_loader(8, 8), "fewer than two batches"), ([frozen], None, "population")):
        _, said = warned(TinyNet(), [BatchLeakageMonitor(), *others], loader or train_loader())
        assert len(said) == 1 and message in said[0]


def test_a_frozen_layer_among_others_is_left_out_and_manual_optimization_refused_with_the_way_out() -> None:
    monitor, module = BatchLeakageMonitor(), TinyNet()
    fit(module, [monitor, FreezeBNCallback(start_step=0, statistics="ema", layers="bn1")])
    assert set(monitor.result.icc) == {"bn2"} and monitor.state_dict()["epochs"] == 2
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="pass forward='forward'"):
        fit(module, BatchLeakageMonitor())


def test_a_picture_is_drawn_at_the_end(tmp_path: Path) -> None:
    fit(TinyNet(), BatchLeakageMonitor(), logger=CSVLogger(tmp_path))
    (picture,) = tmp_path.rglob("figures/batch_leakage/layers-*.png")
    assert picture.stat().st_size > 5000


def test_each_batch_of_an_epoch_is_as_likely_to_be_kept_as_a_copy() -> None:
    kept: Counter[int] = Counter()
    for seed in range(1000):
        reservoir, batch = BatchReservoir(3, seed), torch.tensor(-1)
        for _ in range(10):
            reservoir.keep(batch.add_(1))
        assert reservoir.held == 3
        kept.update(int(shown) for shown in reservoir.batches())
        assert next(reservoir.batches()).add_(100) != next(reservoir.batches()), "what is shown is another copy"
    assert all(count == pytest.approx(300, abs=70) for count in kept.values()) and len(kept) == 10


def fit_on_rank() -> Any:
    """The sampler hands rank 0 the even samples and rank 1 the odd ones."""
    module, monitor = TinyNet(), BatchLeakageMonitor(80, log_errors=True)
    trainer = fit(module, monitor, train_loader(160, 8), devices=2, strategy="ddp")
    logged = trainer.loggers[0].rows if torch.distributed.get_rank() == 0 else None
    return monitor.state_dict(), monitor.result, digest(dict(module.named_parameters())), logged


@pytest.mark.ddp
def test_ranks_agree() -> None:
    first, second = run_on_ranks(fit_on_rank, 2)
    assert first[:3] == second[:3] and first[0]["epochs"] == 2
    noise = (2 / 4 * (1 / 9 + 1 / 70)) ** 0.5 / 8
    assert first[1].noise["bn1"] == pytest.approx(noise), "80 samples in all: five batches of 8 on each of two ranks"
    assert any("batch_leakage/p_value" in row for _, row in first[3])


def fit_with_an_error_on_rank_1(where: str) -> Any:
    fails = {"left": torch.distributed.get_rank() == 1}

    def fail(here: str) -> None:
        if where == here and fails.pop("left", False):
            raise OSError("on rank 1")

    def count(batch: Any) -> int:
        fail("batch_size_fn")
        return len(batch[0])

    def forward(module: Any, batch: Any) -> None:
        fail("forward")
        module(batch[0])

    module, monitor = TinyNet(), BatchLeakageMonitor(80, forward=forward, batch_size_fn=count)
    trainer = fit(module, monitor, train_loader(160, 8), devices=2, strategy="ddp")
    return monitor.state_dict()["epochs"], monitor.p_value, digest(dict(module.named_parameters())), trainer.global_step


@pytest.mark.ddp
@pytest.mark.parametrize("where", ["batch_size_fn", "forward"])
def test_an_error_on_one_rank_costs_all_ranks_that_epochs_test_alone(where: str) -> None:
    first, second = run_on_ranks(fit_with_an_error_on_rank_1, 2, where, timeout=60)
    assert first == second and first[0] == 1 and first[3] == 20
