"""PreciseBNCallback: when it runs, on which batches and weights, and what it writes, shows, logs and refuses."""

from __future__ import annotations

import copy
import csv
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core import rank_zero
from schedulefree import SGDScheduleFree
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from lightning_bn import FromLoader, PreciseBNCallback, Replay, freeze_bn
from tests.callbacks.zoo import (
    Evaluated,
    Images,
    MomentumEncoder,
    Passes,
    Recorder,
    TinyData,
    TinyNet,
    digest,
    exact_statistics,
    expected,
    fit,
    lerp,
    loaded,
    other_data,
    statistics_of,
    torch_noise,
    train_loader,
    trainer_with,
    val_loader,
    validation_loss,
)
from tests.ranks import run_on_ranks


def first_batches(number: int, **kwargs: Any) -> list[Any]:
    return list(train_loader(**kwargs))[:number]


# ------------------------------------------------------------------------------------------------------------- when
TWO_EPOCHS = [("validation", 4), ("validation", 8)]
AT_EPOCH_ENDS = [("epoch end", 4), ("epoch end", 8)]


@pytest.mark.parametrize(
    ("moments", "callback", "trainer"),
    [
        (TWO_EPOCHS, {}, {"num_sanity_val_steps": 2}),
        (TWO_EPOCHS[1:], {"every_n_validations": 2}, {}),
        ([("validation", s) for s in (2, 4, 6, 8)], {}, {"val_check_interval": 2}),
        ([("validation", 3), ("epoch end", 4), ("validation", 7), ("epoch end", 8)], {}, {"val_check_interval": 3}),
        ([("epoch end", 4), ("validation", 8)], {}, {"check_val_every_n_epoch": 2}),
        (AT_EPOCH_ENDS, {}, {"limit_val_batches": 0}),
        ([("epoch end", 4), ("epoch end", 6)], {}, {"limit_val_batches": 0, "max_steps": 6}),
        ([("validation", 4), ("epoch end", 6)], {}, {"max_steps": 6}),
        ([("validation", 2), ("validation", 4)], {}, {"accumulate_grad_batches": 2}),
        ([("validation", 1)], {}, {"fast_dev_run": True}),
        (TWO_EPOCHS, {}, {"barebones": True}),
    ],
    ids=str,
)
def test_runs_before_validations_and_where_none_follows_an_epochs_last_update(
    moments: list[tuple[str, int]], callback: dict[str, Any], trainer: dict[str, Any]
) -> None:
    precise = PreciseBNCallback(20, **callback)
    passes = Passes(precise)
    plain = {"logger": None, "enable_checkpointing": None} if "barebones" in trainer else {}
    if "barebones" in trainer:
        plain |= dict.fromkeys(("enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"))
        plain["log_every_n_steps"] = None
    fit(TinyNet(), [precise, passes], **{**plain, **trainer})
    assert passes.seen == moments


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize("val", [None, DataLoader(Empty())], ids=["no loader", "no batches"])
def test_without_validation_batches_it_runs_at_each_epochs_end(val: Any) -> None:
    precise, module = PreciseBNCallback(20), TinyNet()
    passes = Passes(precise)
    fit(module, [precise, passes], val=val)
    assert passes.seen == AT_EPOCH_ENDS
    assert_close(statistics_of(module), expected(module, first_batches(3)), rtol=1e-5, atol=1e-5)


def test_should_run_can_be_overridden() -> None:
    class InTheSecondEpoch(PreciseBNCallback):
        def should_run(self, trainer: Trainer) -> bool:
            return trainer.current_epoch == 1

    precise = InTheSecondEpoch(20)
    passes = Passes(precise)
    fit(TinyNet(), [precise, passes])
    assert passes.seen == TWO_EPOCHS[1:]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_outside_of_a_fit_it_runs_on_request_only(verb: str) -> None:
    moment = {"validate": "validation"}.get(verb, verb)
    for before, seen in (((), []), ([verb], [(moment, 0)])):
        precise, module = PreciseBNCallback(20, stages=before), TinyNet()
        passes = Passes(precise)
        getattr(trainer_with([precise, passes]), verb)(module, datamodule=Sequential())
        assert passes.seen == seen
        if seen:
            assert_close(statistics_of(module), expected(module, first_batches(3)), rtol=1e-5, atol=1e-5)
        else:
            assert digest(statistics_of(module)) == digest(statistics_of(TinyNet()))


class Sequential(TinyData):
    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader()


@pytest.mark.parametrize("whole", [False, True], ids=["one layer in eval", "the whole model in eval"])
@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_outside_of_a_fit_a_layer_in_eval_counts_as_frozen_unless_the_whole_model_is(verb: str, whole: bool) -> None:
    precise, module = PreciseBNCallback(20, stages=[verb]), TinyNet()
    (module if whole else module.bn1).eval()
    getattr(trainer_with(precise), verb)(module, datamodule=Sequential())
    assert list(precise.result) == (["bn1", "bn2"] if whole else ["bn2"])


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_without_training_data_a_pass_before_a_verb_is_refused_with_an_alternative(verb: str) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{verb} has no training data.*train_dataloader.*source="):
        getattr(trainer_with(PreciseBNCallback(stages=[verb])), verb)(TinyNet(), val_loader())


class SetUpForFit(TinyData):
    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.images = Images(32)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, batch_size=8)


def test_a_data_module_with_training_data_for_a_fit_alone_is_refused_with_an_alternative() -> None:
    precise = PreciseBNCallback(20, stages=["validate"])
    refused = r"SetUpForFit\.train_dataloader fails under trainer\.validate.*setup for every stage, or pass source="
    with pytest.raises(ValueError, match=refused):
        trainer_with(precise).validate(TinyNet(), datamodule=SetUpForFit(), verbose=False)


def test_before_validate_a_loader_of_the_user_supplies_the_batches() -> None:
    module, precise = (
        TinyNet(),
        PreciseBNCallback(10**6, stages=["validate"], source=FromLoader(lambda _: first_batches(2))),
    )
    trainer_with(precise).validate(module, val_loader(), verbose=False)
    assert_close(statistics_of(module), expected(module, first_batches(2)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- which weights, and what is written
def test_each_validation_metric_is_that_of_exact_statistics_of_the_weights_at_that_step() -> None:
    evaluated, ema = Evaluated(), Evaluated()
    fit(TinyNet(), [PreciseBNCallback(20), evaluated], val_check_interval=2)
    fit(TinyNet(), ema, val_check_interval=2)
    for state, metrics, stale in zip(evaluated.states, evaluated.metrics, ema.metrics, strict=True):
        oracle = loaded(state)
        oracle.load_state_dict(expected(oracle, first_batches(3)), strict=False)
        assert metrics["val_loss"] == pytest.approx(validation_loss(oracle), rel=1e-5)
        assert metrics["val_loss"] != pytest.approx(stale["val_loss"], rel=1e-2)


def test_the_result_holds_what_was_measured_and_written() -> None:
    precise, module = PreciseBNCallback(20), TinyNet()
    fit(module, precise)
    assert (precise.result.num_samples, precise.result.num_batches) == (24, 3)
    for name, (mean, var) in exact_statistics(module, first_batches(3)).items():
        assert_close(precise.result[name].mean, mean, rtol=1e-5, atol=1e-5)
        assert_close(precise.result[name].var, var, rtol=1e-5, atol=1e-5)
        assert digest(module.get_submodule(name).running_mean) == digest(precise.result[name].mean.float())


@pytest.mark.parametrize(("num_samples", "shown"), [(8, 8), (9, 16), (10**6, 29)])
def test_whole_batches_are_shown_until_there_are_enough_samples(num_samples: int, shown: int) -> None:
    precise, module = PreciseBNCallback(num_samples), TinyNet()
    fit(module, precise, train_loader(29))
    assert precise.result.num_samples == shown
    assert_close(statistics_of(module), expected(module, first_batches(-(-shown // 8), size=29)), rtol=1e-5, atol=1e-5)


def test_only_chosen_layers_are_written() -> None:
    module, without = TinyNet(), TinyNet()
    fit(module, PreciseBNCallback(20, layers="bn2"))
    fit(without)
    ours, ema = statistics_of(module), statistics_of(without)
    assert digest(ours["bn1.running_mean"]) == digest(ema["bn1.running_mean"])
    assert not torch.allclose(ours["bn2.running_mean"], ema["bn2.running_mean"], rtol=1e-2)


@pytest.mark.parametrize("freeze", [lambda m: m.bn1.eval(), lambda m: freeze_bn(m, layers="bn1")], ids=["eval", "ours"])
@pytest.mark.parametrize("forward", ["training_step", "forward"])
def test_frozen_layers_keep_their_statistics(freeze: Callable[[TinyNet], Any], forward: str) -> None:
    module, precise = TinyNet(), PreciseBNCallback(20, forward=forward)
    before = statistics_of(module)
    freeze(module)
    fit(module, precise)
    after = statistics_of(module)
    assert list(precise.result) == ["bn2"]
    assert digest(after["bn1.running_mean"]) == digest(before["bn1.running_mean"])
    assert digest(after["bn2.running_mean"]) != digest(before["bn2.running_mean"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_statistics_are_those_of_a_forward_in_the_trainers_precision(precision: str) -> None:
    module, plain = TinyNet(), TinyNet()
    precise = PreciseBNCallback(20)
    fit(module, precise, precision=precision)
    plain.load_state_dict(module.state_dict())
    in_float32 = exact_statistics(plain, first_batches(3))
    for name in ("bn1", "bn2"):
        error = (precise.result[name].mean - in_float32[name][0]).abs().max()
        assert 1e-6 < error < 0.05


# ------------------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize(
    ("at_train_epoch_end", "trainer"),
    [(True, {}), (None, {}), (False, {"val_check_interval": 2}), (None, {"accumulate_grad_batches": 2})],
    ids=str,
)
def test_best_and_last_checkpoints_reproduce_the_logged_metric_in_the_plain_model(
    at_train_epoch_end: bool | None, trainer: dict[str, Any], tmp_path: Path
) -> None:
    evaluated = Evaluated()
    saving = ModelCheckpoint(
        tmp_path, monitor="val_loss", save_last=True, save_top_k=-1, save_on_train_epoch_end=at_train_epoch_end
    )
    fit(TinyNet(), [PreciseBNCallback(20), evaluated, saving], enable_checkpointing=True, max_epochs=3, **trainer)
    logged = [metrics["val_loss"] for metrics in evaluated.metrics]
    assert saving.best_k_models and len(set(logged)) == len(logged)
    for path, score in saving.best_k_models.items():
        assert score.item() in logged
        state = torch.load(path, weights_only=True)["state_dict"]
        assert validation_loss(loaded(state)) == pytest.approx(score.item(), abs=1e-6)
    last = torch.load(saving.last_model_path, weights_only=True)["state_dict"]
    assert validation_loss(loaded(last)) == pytest.approx(logged[-1], abs=1e-6)


# ---------------------------------------------------------------------------------------------- averaged weights
class OncePerEpoch(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


AVERAGING: dict[str, Callable[[], WeightAveraging]] = {
    "EMA": functools.partial(EMAWeightAveraging, decay=0.8),
    "EMA from the second epoch": functools.partial(EMAWeightAveraging, decay=0.8, update_starting_at_step=5),
    "EMA, buffers not averaged": functools.partial(EMAWeightAveraging, decay=0.8, use_buffers=False),
    "once per epoch": OncePerEpoch,
}


@pytest.mark.parametrize(("kind", "val"), [*((kind, "default") for kind in AVERAGING), ("EMA", None)])
def test_averaged_weights_get_their_own_statistics_in_validation_and_checkpoint(
    kind: str, val: Any, tmp_path: Path
) -> None:
    evaluated, module = Evaluated(), TinyNet()
    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    callbacks = [AVERAGING[kind](), PreciseBNCallback(20), evaluated, saving]
    fit(module, callbacks, val=val, enable_checkpointing=True, max_epochs=3)
    checkpoints = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    assert len(checkpoints) == 3 and len(evaluated.states) == (3 if val else 0)
    averaged = [*evaluated.states, *(c["state_dict"] for c in checkpoints), module.state_dict()]
    for state in averaged:
        plain = loaded(state)
        assert_close(statistics_of(plain), expected(plain, first_batches(3)), rtol=1e-4, atol=1e-5)
    current = [digest(c["current_model_state"]["head.weight"]) for c in checkpoints]
    assert current != [digest(c["state_dict"]["head.weight"]) for c in checkpoints], "nothing was averaged"


def test_training_under_weight_averaging_is_bit_for_bit_the_same() -> None:
    traces = []
    for precise in ([], [PreciseBNCallback(20)]):
        recorder = Recorder()
        fit(TinyNet(0.5), [AVERAGING["EMA"](), *precise, recorder], train_loader(shuffle=True), val_check_interval=3)
        traces.append(recorder.trace)
    assert traces[0] == traces[1]


def test_a_place_before_weight_averaging_is_refused_with_the_two_to_swap() -> None:
    refused = r"PreciseBNCallback is before EMAWeightAveraging.*swap them, EMAWeightAveraging first"
    with pytest.raises(ValueError, match=refused):
        fit(TinyNet(), [PreciseBNCallback(20), EMAWeightAveraging()])


class ScheduleFree(TinyNet):
    """Switches its optimizer in ``hook`` to the weights that are evaluated, and back afterwards."""

    def configure_optimizers(self) -> Any:
        return SGDScheduleFree(self.parameters(), lr=0.5)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.optimizers().optimizer.train()

    def on_train_start(self) -> None:
        self.optimizers().optimizer.train()


class SwitchedWithTheModel(ScheduleFree):
    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.optimizers().optimizer.eval()


class SwitchedAtTheEpochsStart(ScheduleFree):
    def on_validation_epoch_start(self) -> None:
        self.optimizers().optimizer.eval()


@pytest.mark.parametrize("module", [SwitchedWithTheModel, SwitchedAtTheEpochsStart])
def test_schedule_free_optimizers_get_statistics_of_the_weights_they_evaluate(module: type[ScheduleFree]) -> None:
    evaluated, trained = Evaluated(), Evaluated()
    fit(module(), [PreciseBNCallback(20), evaluated])
    fit(ScheduleFree(), [trained])
    assert len(evaluated.states) == 2
    for state, not_switched in zip(evaluated.states, trained.states, strict=True):
        assert not torch.equal(state["head.weight"], not_switched["head.weight"])
        plain = loaded(state)
        assert_close(statistics_of(plain), expected(plain, first_batches(3)), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- sources
class Doubles(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(2)
        return super().training_step(batch, batch_idx)


def doubled(batches: list[Any]) -> list[Any]:
    return [(2 * x, y) for x, y in batches]


@pytest.mark.parametrize(("num_samples", "last"), [(1, 1), (20, 3), (60, 8)])
def test_a_replay_shows_the_last_training_batches(num_samples: int, last: int) -> None:
    trained, precise = TinyNet(), PreciseBNCallback(num_samples, source="replay")
    fit(trained, precise, train_loader(64, batch_size=8), limit_train_batches=4)
    assert precise.result.num_batches == last
    shown = (2 * first_batches(4, size=64))[-last:]
    assert_close(statistics_of(trained), expected(trained, shown), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainer", [{}, {"val_check_interval": 1}], ids=["once an epoch", "after each batch"])
def test_a_replay_shows_batches_as_the_step_got_them_not_as_a_step_left_them(trainer: dict[str, Any]) -> None:
    trained = Doubles()
    fit(trained, PreciseBNCallback(32, source="replay"), **trainer)
    assert_close(statistics_of(trained), expected(trained, doubled(first_batches(4))), rtol=1e-5, atol=1e-5)


def test_a_replay_that_cannot_fit_is_refused_with_the_numbers() -> None:
    needed = 1000 * (3 * 6 * 6 * 4 + 8)  # an image and its label
    refused = rf"1000 samples a rank of 440 bytes take {needed:,} bytes, more than max_bytes={needed - 1:,}.*Replay"
    with pytest.raises(ValueError, match=refused):
        fit(TinyNet(), PreciseBNCallback(1000, source=Replay(max_bytes=needed - 1)))
    fit(TinyNet(), PreciseBNCallback(1000, source=Replay(max_bytes=needed)))


def test_a_replay_reports_its_samples_until_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(rank_zero.log, "info", lambda message, **_: messages.append(message))
    fit(TinyNet(), PreciseBNCallback(16, source="replay"), val_check_interval=1)
    messages = [message for message in messages if "replay" in message]
    assert messages == ["PreciseBNCallback: the replay holds 8 of 16 samples so far, and uses those."]


def test_an_empty_replay_warns() -> None:
    """As Lightning validates first when it resumes a checkpoint written in the middle of a validation."""
    module, precise = TinyNet(), PreciseBNCallback(16, source="replay", stages=["validate"])
    before = digest(statistics_of(module))
    with pytest.warns(
        UserWarning, match="no batches to replay before the first training batch, nor right after a resume"
    ):
        trainer_with(precise).validate(module, val_loader(), verbose=False)
    assert digest(statistics_of(module)) == before


def test_a_second_fit_does_not_replay_batches_of_the_first() -> None:
    precise, module = PreciseBNCallback(64, source="replay"), TinyNet()
    fit(TinyNet(), precise, train_loader(40))
    fit(module, precise, max_epochs=1)
    assert precise.result.num_samples == 32
    assert_close(statistics_of(module), expected(module, first_batches(4)), rtol=1e-5, atol=1e-5)


def test_the_function_of_a_loader_is_called_with_the_trainer_once_per_pass() -> None:
    asked: list[int] = []

    def source(trainer: Trainer) -> list[Any]:
        asked.append(trainer.global_step)
        return first_batches(2, size=24)

    trained, precise = TinyNet(), PreciseBNCallback(10**6, source=FromLoader(source))
    fit(trained, precise)
    assert asked == [4, 8]
    assert_close(statistics_of(trained), expected(trained, first_batches(2, size=24)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_a_function_may_return_the_live_loader(kwargs: dict[str, Any]) -> None:
    traces = []
    for precise in ([], [PreciseBNCallback(20, source=FromLoader(lambda trainer: trainer.train_dataloader))]):
        recorder = Recorder()
        loader = train_loader(shuffle=True, augment=torch_noise, **kwargs)
        fit(TinyNet(), [*precise, recorder], loader, val_check_interval=2)
        traces.append(recorder.trace)
    assert traces[0] == traces[1]
    assert precise[0].result.num_samples == 24


def test_a_function_may_return_several_live_loaders() -> None:
    module, precise = Several(), PreciseBNCallback(10**6, source=FromLoader(lambda trainer: trainer.train_dataloader))
    fit(module, precise, {"a": train_loader(24), "b": train_loader(32)})
    assert precise.result.num_batches == 4
    shown = first_batches(3, size=24) + first_batches(1, size=24)
    assert_close(statistics_of(module), expected(module, shown), rtol=1e-5, atol=1e-5)


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="No batch reached a BatchNorm layer"):
        fit(TinyNet(), PreciseBNCallback(20, source=FromLoader(lambda _: [])))


def test_the_forward_function_gets_module_and_batch() -> None:
    module = TinyNet()
    precise = PreciseBNCallback(20, forward=lambda module, batch: module.bn1(module.conv1(batch[0])))
    fit(module, precise)
    assert list(precise.result) == ["bn1"]


# ------------------------------------------------------------------------------ refused, with an alternative
class FetchesItself(TinyNet):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class NeedsGradients(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + torch.autograd.grad(loss, self.conv1.weight, create_graph=True)[0].square().sum()


WITH_OTHER_FORWARD = {
    FetchesItself: r"FetchesItself\.training_step takes a dataloader_iter.*forward='forward' or a function",
    NeedsGradients: r"NeedsGradients\.training_step needs gradients itself.*forward='forward' or a function",
}


@pytest.mark.parametrize(("module", "refused"), WITH_OTHER_FORWARD.items())
def test_an_unusable_training_step_is_refused_and_the_alternatives_work(module: type[TinyNet], refused: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=refused):
        fit(module(), PreciseBNCallback(20))
    source = {"source": FromLoader(lambda _: first_batches(3))} if module is FetchesItself else {}
    for forward in ("forward", lambda module, batch: module(batch[0])):
        trained, precise = module(), PreciseBNCallback(20, forward=forward, **source)
        fit(trained, precise)
        assert_close(statistics_of(trained), expected(trained, first_batches(3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("update", [lerp, other_data])
def test_a_momentum_encoder_is_measured_as_the_next_step_will_use_it(update: Callable[..., Any]) -> None:
    module, precise = MomentumEncoder(update), PreciseBNCallback(20)
    fit(module, precise)
    convolution = copy.deepcopy(module.teacher[0]).double()
    for own, theirs in zip(convolution.parameters(), module.student[0].parameters(), strict=True):
        own.data.lerp_(theirs.data.double(), 0.1)  # once, though the pass has run three steps
    inputs = convolution(torch.cat([x for x, _ in first_batches(3)]).double())
    var, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
    assert_close(precise.result["teacher.1"].mean.double(), mean, rtol=1e-5, atol=1e-5)
    assert_close(precise.result["teacher.1"].var.double(), var, rtol=1e-5, atol=1e-5)


class Stateful(DataLoader[Any]):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StatefulImages(Images):
    state_dict, load_state_dict = Stateful.state_dict, Stateful.load_state_dict


class Resets(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


class UsedUp(IterableDataset[Any]):
    """An iterator: whoever reads it takes from the others."""

    def __init__(self) -> None:
        self.images = iter([Images(32)[i] for i in range(32)] * 3)

    def __iter__(self) -> UsedUp:
        return self

    def __next__(self) -> Any:
        return next(self.images)


class Own:
    def __iter__(self) -> Iterator[Any]:
        return iter(first_batches(4))


WITH_OTHER_SOURCE: dict[str, tuple[Callable[[], Any], str]] = {
    "stateful loader": (lambda: Stateful(Images(32), batch_size=8), r"stateful \(Stateful\)"),
    "stateful dataset": (lambda: DataLoader(StatefulImages(32), batch_size=8), r"stateful \(StatefulImages\)"),
    "own __iter__": (lambda: Resets(Images(32), batch_size=8), "Resets overrides __iter__"),
    "iterator dataset": (lambda: DataLoader(UsedUp(), batch_size=8), "UsedUp is an iterator"),
    "own iterable": (Own, "is a Own"),
    "generator": (lambda: (batch for batch in first_batches(4)), "generator is an iterator"),
    "one of several": (lambda: {"a": train_loader(), "b": Own()}, "is a Own"),
}


@pytest.mark.parametrize(("loader", "refused"), WITH_OTHER_SOURCE.values(), ids=WITH_OTHER_SOURCE)
def test_a_loader_that_cannot_be_read_twice_is_refused_and_both_alternatives_work(
    loader: Callable[[], Any], refused: str
) -> None:
    several = isinstance(loader(), dict)
    module = Several if several else TinyNet
    with pytest.raises(ValueError, match=rf"{refused}.*source='replay'.*FromLoader"):
        fit(module(), PreciseBNCallback(20), loader())
    batches = [{"a": b, "b": b} for b in first_batches(4)] if several else first_batches(4)
    for source in ("replay", FromLoader(lambda _: batches)):
        trained, precise = module(), PreciseBNCallback(20, source=source)
        fit(trained, precise, loader(), max_epochs=1)
        assert precise.result.num_samples == 24


# ------------------------------------------------------------------------------------ batches and loaders of any kind
class Several(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch
        return super().training_step(next(part for part in parts if part is not None), batch_idx)


@pytest.mark.parametrize(
    ("mode", "batches", "kind"), [("min_size", 3, dict), ("max_size", 4, list), ("max_size_cycle", 4, dict)]
)
def test_several_train_loaders_come_as_in_training(mode: Any, batches: int, kind: type) -> None:
    loaders = {"a": train_loader(24), "b": train_loader(32)}
    combined = CombinedLoader(loaders if kind is dict else list(loaders.values()), mode)
    module, precise = Several(), PreciseBNCallback(10**6)
    fit(module, precise, combined)
    assert precise.result.num_batches == batches
    shown = first_batches(4, size=24)
    shown += {"min_size": [], "max_size": first_batches(4)[3:], "max_size_cycle": first_batches(1, size=24)}[mode]
    assert_close(statistics_of(module), expected(module, shown), rtol=1e-5, atol=1e-5)


@dataclass
class Scene:
    x: Tensor
    y: Tensor


class Moved:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any) -> Moved:
        return Moved(self.x.to(device), self.y.to(device))


def as_dict(batch: Any) -> dict[str, Tensor]:
    return {"x": batch[0], "y": batch[1]}


class OfAnyKind(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)
        return super().training_step((x, y), batch_idx)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (as_dict, "train_dataloader"),
        (lambda b: Scene(*b), "replay"),
        (lambda b: Moved(*b), "train_dataloader"),
        (lambda b: Moved(*b), "replay"),
    ],
)
def test_a_batch_may_have_any_structure(kind: Callable[[Any], Any], source: Any) -> None:
    def collate(items: list[Any]) -> Any:
        return kind(torch.utils.data.default_collate(items))

    count = (lambda batch: len(batch.x)) if isinstance(kind([torch.zeros(1)] * 2), Moved) else None
    module, precise = OfAnyKind(), PreciseBNCallback(32, source=source, batch_size_fn=count)
    fit(module, precise, train_loader(collate_fn=collate))
    assert precise.result.num_samples == 32
    assert_close(statistics_of(module), expected(module, first_batches(4)), rtol=1e-5, atol=1e-5)


def test_a_batch_whose_samples_cannot_be_counted_asks_for_count() -> None:
    def collate(items: list[Any]) -> Any:
        return Moved(*torch.utils.data.default_collate(items))

    with pytest.raises(ValueError, match=r"a batch that is a Moved.*batch_size_fn="):
        fit(OfAnyKind(), PreciseBNCallback(20), train_loader(collate_fn=collate))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        images = Images(32)
        return (images[i] for i in range(32))


def test_an_iterable_dataset_is_read_from_its_start() -> None:
    module = TinyNet()
    fit(module, PreciseBNCallback(20), DataLoader(Stream(), batch_size=8))
    assert_close(statistics_of(module), expected(module, first_batches(3)), rtol=1e-5, atol=1e-5)


def test_a_pass_reads_no_more_batches_than_an_epoch_may() -> None:
    module, precise = TinyNet(), PreciseBNCallback(10**6)
    fit(module, precise, limit_train_batches=2)
    assert precise.result.num_batches == 2


def test_compiled_modules_are_shown_batches_eagerly() -> None:
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(trainer.global_step)
        return graph.forward

    class Compiled(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.features = torch.compile(self.features, backend=backend)

    module, precise = Compiled(), PreciseBNCallback(20)
    trainer = trainer_with(precise, max_epochs=1)
    trainer.fit(module, train_loader(), None)
    assert set(compiled) == {0}
    assert_close(statistics_of(module), expected(module, first_batches(3)), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- displayed and logged
def test_a_pass_has_a_line_in_the_tqdm_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    init, update = Tqdm.__init__, Tqdm.update

    def watched_init(bar: Any, *args: Any, **kwargs: Any) -> None:
        init(bar, *args, **kwargs)
        lines.append((bar.desc.rstrip(": "), bar.total, bar.unit))

    def watched_update(bar: Any, n: float = 1) -> Any:
        lines.append(n if bar.desc.startswith("PreciseBN") else 0)
        return update(bar, n)

    monkeypatch.setattr(Tqdm, "__init__", watched_init)
    monkeypatch.setattr(Tqdm, "update", watched_update)
    fit(TinyNet(), [PreciseBNCallback(20), TQDMProgressBar()], enable_progress_bar=True)
    assert [line for line in lines if isinstance(line, tuple) and line[0] == "PreciseBN"] == [
        ("PreciseBN", 20, "sample")
    ] * 2
    assert sum(n for n in lines if not isinstance(n, tuple)) == 2 * 24


@pytest.mark.parametrize("val", ["default", None], ids=["validation", "no validation"])
def test_a_pass_has_a_line_in_the_rich_bar(val: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    totals, bar = [], RichProgressBar()
    add_task = bar._add_task

    def watched(total: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        if "PreciseBN" in description:
            totals.append(total)
        return add_task(total, description, *args, **kwargs)

    monkeypatch.setattr(bar, "_add_task", watched)
    fit(TinyNet(), [PreciseBNCallback(20), bar], val=val, enable_progress_bar=True)
    assert totals == [20, 20]
    assert not [task for task in bar.progress.tasks if "PreciseBN" in task.description], "the line is still there"


def rows(folder: Path, key: str) -> dict[int, float]:
    """Step -> value of a key in a CSVLogger's file."""
    with next(folder.rglob("metrics.csv")).open() as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


ALWAYS_LOGGED = {"seconds", "num_samples"} | {f"{gap}_{of}" for gap in ("mean_gap", "var_gap") for of in ("p50", "max")}


@pytest.mark.parametrize(
    ("val", "trainer", "beside"),
    [
        ("default", {}, "val_loss"),
        ("default", {"val_check_interval": 2}, "val_loss"),
        (None, {"max_steps": 6}, "train_loss_epoch"),
        (None, {"accumulate_grad_batches": 2}, "train_loss_epoch"),
    ],
    ids=str,
)
def test_duration_and_gaps_are_logged_at_the_steps_of_the_modules_metrics(
    val: Any, trainer: dict[str, Any], beside: str, tmp_path: Path
) -> None:
    fit(TinyNet(), PreciseBNCallback(20), val=val, logger=CSVLogger(tmp_path), **trainer)
    steps = list(rows(tmp_path, beside))
    assert len(steps) >= 2
    for key in ALWAYS_LOGGED:
        logged = rows(tmp_path, f"precise_bn/{key}")
        assert list(logged) == steps
        assert all(value > 0 for value in logged.values())
    assert set(rows(tmp_path, "precise_bn/num_samples").values()) == {24}


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_before_a_verb_metrics_are_logged_at_its_step(verb: str, tmp_path: Path) -> None:
    trainer = fit(TinyNet(), PreciseBNCallback(20, stages=[verb]), Sequential(), logger=CSVLogger(tmp_path))
    getattr(trainer, verb)(trainer.model, datamodule=Sequential(), verbose=False)
    beside = rows(tmp_path, {"validate": "val_loss", "test": "test_loss"}[verb])
    assert max(rows(tmp_path, "precise_bn/seconds")) == max(beside) == trainer.global_step


def test_the_gaps_are_those_from_the_ema_to_the_new_statistics(tmp_path: Path) -> None:
    module, stale = TinyNet(), TinyNet()
    fit(module, PreciseBNCallback(20), max_epochs=1, logger=CSVLogger(tmp_path))
    fit(stale, max_epochs=1)
    new, old = statistics_of(module), statistics_of(stale)
    gaps: dict[str, list[float]] = {"mean_gap": [], "var_gap": []}
    for bn in ("bn1", "bn2"):
        moved = (new[f"{bn}.running_mean"] - old[f"{bn}.running_mean"]) / old[f"{bn}.running_var"].sqrt()
        ratio = (new[f"{bn}.running_var"] / old[f"{bn}.running_var"]).log()
        for gap, values in (("mean_gap", moved), ("var_gap", ratio)):
            gaps[gap].append(values.square().mean().sqrt().item())
    for gap, of_layers in gaps.items():
        assert rows(tmp_path, f"precise_bn/{gap}_max") == {3: pytest.approx(max(of_layers), rel=1e-3)}
        assert rows(tmp_path, f"precise_bn/{gap}_p50") == {3: pytest.approx(sum(of_layers) / 2, rel=1e-3)}


# ------------------------------------------------------------------------------------------------------ many ranks
def batches_of_ranks(world_size: int, size: int, batch_size: int) -> list[Any]:
    """All batches that DistributedSamplers deal out, those of all ranks together."""
    images, labels = Images(size).images, Images(size).labels
    order = list(range(size)) + list(range(-size % world_size))
    shares = [torch.tensor(order[rank::world_size]) for rank in range(world_size)]
    return [(images[part], labels[part]) for share in shares for part in share.split(batch_size)]


def uneven_loader(trainer: Trainer) -> list[Any]:
    """Five batches: two ranks get three and two, four ranks two, one, one and one."""
    return first_batches(5, size=37)


def nothing_on_rank_1(trainer: Trainer) -> list[Any]:
    return first_batches(3) if trainer.global_rank != 1 else []


def own_on_each_rank(trainer: Trainer) -> list[Any]:
    return first_batches(5, size=37)[trainer.global_rank :]


def with_workers(trainer: Trainer) -> DataLoader[Any]:
    return train_loader(37, num_workers=1, multiprocessing_context="fork")  # a forkserver takes 10 s to start


def shuffled(trainer: Trainer) -> DataLoader[Any]:
    return train_loader(37, shuffle=True)


def fit_precisely(world_size: int, callback: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    module, precise, recorder = TinyNet(), PreciseBNCallback(**callback), Recorder()
    dealing = DistributedSampler(range(44), shuffle=False)  # type: ignore[arg-type]
    loader = train_loader(44, batch_size=4, sampler=dealing)
    fit(module, [precise, recorder], loader, devices=world_size, strategy="ddp", max_epochs=1, **trainer)
    return {"state": module.state_dict(), "result": precise.result, "trace": recorder.trace}


def precise_on_ranks(world_size: int, callback: dict[str, Any], **trainer: Any) -> tuple[TinyNet, list[dict[str, Any]]]:
    """The trained module, after checking that all ranks ended with the same."""
    ranks = run_on_ranks(fit_precisely, world_size, world_size, callback, trainer)
    for other in ranks[1:]:
        assert digest(other["state"]) == digest(ranks[0]["state"])
        for name, measured in other["result"].items():
            assert digest(measured.mean) == digest(ranks[0]["result"][name].mean)
            assert digest(measured.var) == digest(ranks[0]["result"][name].var)
    return loaded(ranks[0]["state"]), ranks


@pytest.mark.ddp
@pytest.mark.parametrize(("world_size", "source"), [(2, "train_dataloader"), (4, "replay")])
def test_ranks_end_with_the_statistics_of_all_ranks_data(world_size: int, source: str) -> None:
    module, ranks = precise_on_ranks(world_size, {"num_samples": 44, "source": source})
    shown = batches_of_ranks(world_size, 44, 4)
    assert ranks[0]["result"].num_samples == 44
    assert_close(statistics_of(module), expected(module, shown), rtol=1e-5, atol=1e-5)


@pytest.mark.ddp
@pytest.mark.parametrize(("world_size", "source"), [(2, with_workers), (4, uneven_loader)])
def test_ranks_share_the_batches_of_a_loader_in_uneven_numbers(world_size: int, source: Any) -> None:
    module, ranks = precise_on_ranks(world_size, {"num_samples": 10**6, "source": FromLoader(source)})
    assert (ranks[0]["result"].num_samples, ranks[0]["result"].num_batches) == (37, 5)
    assert_close(statistics_of(module), expected(module, first_batches(5, size=37)), rtol=1e-5, atol=1e-5)


@pytest.mark.ddp
def test_a_shuffled_loader_is_shared_without_repeats() -> None:
    module, ranks = precise_on_ranks(2, {"num_samples": 10**6, "source": FromLoader(shuffled)})
    assert ranks[0]["result"].num_samples == 37
    mean, _ = exact_statistics(module, first_batches(5, size=37))["bn1"]
    assert_close(module.bn1.running_mean, mean.float(), rtol=1e-5, atol=1e-5)  # the first layer's is the data's


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("source", "shown"), [(uneven_loader, 2 * 37), (own_on_each_rank, 37 + 29), (nothing_on_rank_1, 24)]
)
def test_without_shard_every_rank_takes_all_of_its_batches(source: Any, shown: int) -> None:
    module, ranks = precise_on_ranks(2, {"num_samples": 10**6, "source": FromLoader(source, shard=False)})
    assert ranks[0]["result"].num_samples == shown
    batches = {
        uneven_loader: first_batches(5, size=37) * 2,
        own_on_each_rank: first_batches(5, size=37) + first_batches(5, size=37)[1:],
        nothing_on_rank_1: first_batches(3),
    }[source]
    assert_close(statistics_of(module), expected(module, batches), rtol=1e-5, atol=1e-5)


def fit_with_and_without(dealing: str) -> list[Any]:
    """On one rank: the traces of trainings without a pass, with one over the train dataloader and over a loader."""
    traces = []
    for precise in ([], [PreciseBNCallback(20)], [PreciseBNCallback(20, source=FromLoader(uneven_loader))]):
        recorder = Recorder()
        fit(
            TinyNet(0.5),
            [*precise, recorder],
            train_loader(44, batch_size=4, augment=torch_noise, **SAMPLERS[dealing]()),
            devices=2,
            strategy="ddp",
            val_check_interval=2,
            use_distributed_sampler=dealing == "by Lightning",
        )
        traces.append(recorder.trace)
    return traces


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "by Lightning": dict,
    "by the user, shuffled": lambda: {"sampler": DistributedSampler(range(44), seed=3)},  # type: ignore[arg-type]
    "every rank for itself": lambda: {"sampler": RandomSampler(range(20)), "generator": torch.Generator()},
}


@pytest.mark.ddp
@pytest.mark.parametrize("dealing", SAMPLERS)
def test_distributed_training_is_bit_for_bit_the_same_on_every_rank(dealing: str) -> None:
    for without, *others in run_on_ranks(fit_with_and_without, 2, dealing):
        assert len(without) > 50
        for observed in others:
            assert observed == without
