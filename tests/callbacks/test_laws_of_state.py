"""Laws of every callback, II: keys, copies and checkpoints, the command line, resuming, fresh fits, and refusals."""

import copy
import functools
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_bn import (
    BatchLeakageMonitor,
    BNStatsMonitor,
    ForecastBNCallback,
    FreezeBNCallback,
    PassConfig,
    PreciseBNCallback,
)
from tests.callbacks import zoo
from tests.callbacks.zoo import CALLBACKS, WITH_A_PASS, At, TinyNet, caught, digest, every_callback, every_pass, fit
from tests.ranks import run_on_ranks

IN_STEPS: list[Any] = []
"""What training steps have recorded, outside of the module, whose attributes a pass restores."""


class Peeking(TinyNet):
    """Looks at itself in every training step, those of a pass included."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        IN_STEPS.append(looked_at(self))
        return super().training_step(batch, batch_idx)


def at_every_moment(look: Callable[[nn.Module], Any], found: list[Any]) -> Callback:
    moments = "on_train_batch_start", "on_validation_epoch_end", "on_train_end"
    return At(lambda trainer, module, *_: found.append(look(module)), *moments)


def shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(key, value.shape) for key, value in module.state_dict().items()]


def pickled(o: Any) -> Any:
    return pickle.loads(pickle.dumps(o))


def looked_at(module: nn.Module) -> Any:
    """What must equal a plain module's: keys and shapes of the state dict; classes, attributes and values of a copy."""
    found: list[Any] = [shapes(module)]
    for copy_of in (pickled, copy.deepcopy):
        twin = copy_of(module)
        same = digest(list(twin.parameters())) == digest(list(module.parameters()))
        found += [[type(m) for m in twin.modules()][1:], same, sorted(vars(twin.bn1))]
    return found


@every_callback
def test_keys_and_copies_are_always_the_plain_models_and_checkpoints_load_into_it(make: Any, tmp_path: Path) -> None:
    found, module = [], Peeking()
    IN_STEPS.clear()
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    fit(module, [make(), at_every_moment(looked_at, found), saving])
    plain = looked_at(Peeking())
    assert plain[0] == shapes(TinyNet())
    assert len(IN_STEPS) > 8 or make not in WITH_A_PASS.values(), "no pass was run"
    assert all(one == plain for one in found + IN_STEPS)
    checkpoints = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    assert len(checkpoints) == 8
    assert all(TinyNet().load_state_dict(checkpoint["state_dict"], strict=True) for checkpoint in checkpoints)


@every_callback
def test_the_callback_copies_before_between_and_after(make: Callable[[], Any]) -> None:
    def copies(_: Any) -> bool:
        state = digest(callback.state_dict())
        return all(digest(copy_of(callback).state_dict()) == state for copy_of in (pickled, copy.deepcopy))

    callback: Any = make()
    found = [copies(None)]
    fit(TinyNet(), [callback, at_every_moment(copies, found)])
    assert len(found) > 8 and all(found)
    fit(TinyNet(), pickled(copy.deepcopy(callback)), max_epochs=1)  # a copy of a used callback works


@every_callback
def test_the_command_line_trains_with_it(make: Any, tmp_path: Path) -> None:
    """What it makes of every value of every argument is in test_arguments.py."""
    option = zoo.patterns_of(make)
    options = {key: value for key, value in make.keywords.items() if key != "precise"} | {option: ["bn*"]}
    options = {k: f"{v.__module__}.{v.__name__}" if callable(v) else v for k, v in options.items()}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    quiet = {"logger": logger, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    callbacks = [{"class_path": f"lightning_bn.{make.func.__name__}", "init_args": options}]
    config = {
        "model": {"class_path": "tests.callbacks.zoo.TinyNet", "init_args": {"dropout": 0.1}},
        "data": {"class_path": "tests.callbacks.zoo.TinyData"},
        "trainer": {**quiet, "max_epochs": 2, "accelerator": "cpu", "callbacks": callbacks},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(save_config_callback=None, args=["fit", "--config", str(path)])
    callback = next(c for c in cli.trainer.callbacks if type(c) is make.func)
    assert getattr(callback, option) == ["bn*"]
    pickled(callback)


class SavesAt(Checkpoint):
    """Writes ``batch-5.ckpt`` after the fifth batch, and so on: at the three moments of `ModelCheckpoint`."""

    def __init__(self, folder: Path, moments: list[str]) -> None:
        self.folder, self.moments = folder, moments

    def save(self, moment: str, trainer: Trainer, *_: Any) -> None:
        if f"{moment}-{trainer.global_step}" in self.moments:
            trainer.save_checkpoint(self.folder / f"{moment}-{trainer.global_step}.ckpt")

    on_train_batch_end = functools.partialmethod(save, "batch")
    on_validation_end = functools.partialmethod(save, "validation")
    on_train_epoch_end = functools.partialmethod(save, "epoch")


freezing = functools.partial(FreezeBNCallback, precise=PassConfig(20))


def monitoring(every_n_batches: int, window: int) -> Callable[[], list[Any]]:
    return lambda: [BNStatsMonitor(every_n_batches, window=window)]


AS_THEY_ARE = ("ForecastBN", "BNStatsMonitor", "GhostBN", "SyncBN", "DomainSpecificBN", "RoIShuffle")
RESUMED: dict[str, Callable[[], list[Any]]] = {
    "PreciseBN": lambda: [PreciseBNCallback(20, every_n_validations=2)],
    "PreciseBN, skip_below": lambda: [PreciseBNCallback(20, skip_below=0.3)],
    "FreezeBN before the switch": lambda: [freezing(start_step=8, warmup_epochs=1.5)],
    "FreezeBN after the switch": lambda: [freezing(start_step=3, warmup_epochs=1.5)],
    "FreezeBN, last epochs": lambda: [freezing(last_n_epochs=1, warmup_steps=5, affine=True)],
    "FreezeBN, from a fraction on": lambda: [freezing(start_fraction=0.5, warmup_steps=5)],
    "FreezeBN, affine, on EMA": lambda: [freezing(start_step=3, statistics="ema", affine=True)],
    "FreezeBN before PreciseBN": lambda: [freezing(start_step=4, statistics="ema"), PreciseBNCallback(20)],
    **{name: lambda name=name: [CALLBACKS[name]()] for name in AS_THEY_ARE},
    "BatchLeakageMonitor": lambda: [BatchLeakageMonitor(24)],
}
WITH_A_PHASE: dict[str, Callable[[], list[Any]]] = {
    "PreciseBN, every third": lambda: [PreciseBNCallback(20, every_n_validations=3)],
    "ForecastBN, every second": lambda: [ForecastBNCallback(2)],
    "PreciseBN before FreezeBN": lambda: [PreciseBNCallback(20), freezing(start_step=4, statistics="ema")],
}
"""Those whose passes depend on the number of validations."""
VALIDATING = [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}]
MOMENTS = ["batch-4", "batch-5", "validation-6", "validation-8", "epoch-8"]
"""The first is written before the epoch's validation and end, which a resumed fit skips."""
AT_BATCH_ENDS = ["batch-4", "batch-6", "batch-12"]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("name", "make", "trainer", "moments"),
    [
        *((n, make, {"val_check_interval": 2}, MOMENTS) for n, make in RESUMED.items()),
        *((n, make, validating, AT_BATCH_ENDS) for n, make in WITH_A_PHASE.items() for validating in VALIDATING),
        *(("BNStatsMonitor", monitoring(*o), {"limit_val_batches": 0}, ["batch-4"]) for o in ((3, 1), (1, 3))),
    ],
)
def test_a_resumed_fit_ends_as_the_uninterrupted_one(
    name: str, make: Callable[[], list[Any]], trainer: dict[str, Any], moments: list[str], tmp_path: Path
) -> None:
    module, whole = TinyNet(), make()
    trainer = {"max_epochs": 3, **trainer}
    fit(module, [*whole, SavesAt(tmp_path, moments)], zoo.equal_batches(), **trainer)
    if name == "BatchLeakageMonitor":  # loses the batches of the interrupted epoch
        moments = moments[1:]
    for last in moments:
        checkpoint, resumed, ours = tmp_path / f"{last}.ckpt", TinyNet(), make()
        at_start: list[Any] = []
        look = At(lambda *_: at_start.append(digest(ours[0].state_dict())), "on_train_start")  # noqa: B023
        fit(resumed, [look, *ours], zoo.equal_batches(), ckpt_path=checkpoint, **trainer)
        saved = torch.load(checkpoint, weights_only=True)["callbacks"].get(ours[0].state_key, {})
        assert at_start in ([], [digest(saved)]), last
        assert [digest(c.state_dict()) for c in ours] == [digest(c.state_dict()) for c in whole], last
        assert digest(resumed.state_dict()) == digest(module.state_dict()), last


def kill(trainer: Trainer, *_: Any) -> None:
    """Kill -9, right before the batch after the fifth optimizer step."""
    if trainer.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, killed: bool = False, **kwargs: Any) -> Any:
    """Two epochs of four equal batches: PreciseBN, then frozen from step 6; a checkpoint per epoch."""
    module = TinyNet()
    ours = [PreciseBNCallback(20), FreezeBNCallback(start_step=6, precise=PassConfig(20), warmup_epochs=0.5)]
    others = [ModelCheckpoint(folder, "{step}", save_top_k=-1), *([At(kill, "on_train_batch_start")] if killed else [])]
    fit(module, [*ours, *others], zoo.equal_batches(), **kwargs)
    return digest(module.state_dict()), digest([c.state_dict() for c in ours])


def test_a_killed_training_resumes_as_the_uninterrupted_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0: died"):
        run_on_ranks(train, 1, tmp_path / "killed", True)
    assert train(tmp_path / "resumed", ckpt_path=tmp_path / "killed" / "step=4.ckpt") == train(tmp_path / "whole")


class Keeps(TinyNet):
    """Has other layers, and stores a tensor between them, so that its micro-batches cannot wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3)
        self.kept = torch.zeros(())

    def features(self, x: Tensor) -> Tensor:
        self.kept = x.mean()
        return super().features(x)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)  # another micro-batch has overwritten what is kept
        return (lambda x: found(x * (1 + self.kept))) if name == "conv2" else found


def outcome_of(callback: Any, module: TinyNet, **options: Any) -> dict[str, Any]:
    with caught() as said:
        trainer = fit(module, callback, **options)
    rows = [(at, {k: repr(v) for k, v in row.items() if "seconds" not in k}) for at, row in trainer.logger.rows]
    found = digest(module.state_dict()), digest(callback.state_dict()), repr(getattr(callback, "result", None))
    return dict(zip(("model", "state", "result", "logged", "warnings"), (*found, rows, said), strict=True))


@every_callback
@pytest.mark.parametrize(
    ("first", "second", "options"), [(Keeps, TinyNet, {}), (TinyNet, Keeps, {"val": None})], ids=["from", "to"]
)
def test_one_callback_over_two_models_is_as_two_callbacks(make: Any, first: Any, second: Any, options: Any) -> None:
    used = make()
    fit(first(), used)
    assert outcome_of(used, second(), **options) == outcome_of(make(), second(), **options)


class WithoutBatchNorm(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 6)


@every_callback
def test_what_it_cannot_act_on_is_refused_with_the_names_there_are(make: Callable[..., Any]) -> None:
    option = zoo.patterns_of(make)
    with pytest.raises(ValueError, match="WithoutBatchNorm has no BatchNorm layer"):
        fit(WithoutBatchNorm(), make())
    match = rf"{option}='backbone\.\*' matches no (BatchNorm layer|module) of TinyNet.*bn1.* bn2"
    with pytest.raises(ValueError, match=match):
        fit(TinyNet(), make(**{option: "backbone.*"}))
    with pytest.raises(ValueError, match=r"Two \w+s act on layer 'bn2' \(1 in all\).*do not overlap"):
        fit(TinyNet(), [make(**{option: patterns}) for patterns in ("bn*", "bn2")])


@every_callback
def test_two_on_different_layers_work_and_keep_their_own_state(make: Callable[..., Any], tmp_path: Path) -> None:
    first, second = (make(**{zoo.patterns_of(make): patterns}) for patterns in ("bn1", ["bn2"]))
    fit(TinyNet(), [first, second]).save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert all(digest(states.get(c.state_key, {})) == digest(c.state_dict()) for c in (first, second))
    assert first.state_key != second.state_key


@every_pass
def test_with_nothing_to_do_it_warns_once_and_changes_nothing(make: Callable[..., Any]) -> None:
    module, before = TinyNet(), zoo.statistics_of(TinyNet())
    module.bn1.eval(), module.bn2.eval()
    with caught("all of its layers are frozen") as said:
        fit(module, make())
    assert len(said) == 1
    assert digest(zoo.statistics_of(module)) == digest(before)


class Elsewhere(pytorch_lightning.LightningModule):
    """Of pytorch_lightning, whose classes are no subclasses of lightning.pytorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        IN_STEPS.append(batch_idx)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@every_callback
def test_it_works_in_a_trainer_of_pytorch_lightning(make: Callable[..., Any], tmp_path: Path) -> None:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    options = {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": tmp_path, **quiet}
    results = []
    for callbacks in ([], [make(**{zoo.patterns_of(make): "net.*"})]):
        torch.manual_seed(0)
        module, trainer = Elsewhere(), pytorch_lightning.Trainer(callbacks=callbacks, **options)
        if make in zoo.EVALUATING.values():
            before = digest(module.state_dict())
            results += trainer.test(module, zoo.val_loader())
            assert digest(module.state_dict()) == before
    if results:
        assert results[0] != results[1]
        unadapted = {f"unadapted/{key}": value for key, value in results[0].items()}
        assert not getattr(callbacks[0], "log_unadapted", False) or callbacks[0].source_metrics == unadapted
    IN_STEPS.clear()
    trainer.fit(module, zoo.train_loader(), zoo.val_loader())
    # no pass, one or two; the first pass runs its first batch three times
    assert len(IN_STEPS) in (8, 8 + 3, 8 + 5, 8 + 5 + 3, 8 + 2 * 4)
