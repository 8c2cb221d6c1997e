"""The laws of every callback: keys, neutrality, restoration, equal ranks, resuming, fresh fits, errors and warnings.

A new callback joins by one line in `CALLBACKS`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
import pickle
import random
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler

from lightning_bn import (
    AdaBNCallback,
    BatchLeakageMonitor,
    BNStatsMonitor,
    DomainSpecificBNCallback,
    ForecastBNCallback,
    FreezeBNCallback,
    FromLoader,
    GhostBNCallback,
    MiniBatchInferenceCallback,
    PassConfig,
    PreciseBNCallback,
    RoIShuffleCallback,
    SyncBNCallback,
)
from tests.callbacks.zoo import (
    Images,
    MomentumEncoder,
    Recorder,
    TinyData,
    TinyNet,
    digest,
    fit,
    in_a_pass,
    lerp,
    lerp_data,
    numpy_noise,
    other_data,
    python_noise,
    random_states,
    state_but_statistics,
    statistics_of,
    torch_noise,
    train_loader,
    trainer_with,
    val_loader,
)
from tests.ranks import run_on_ranks

WITH_A_PASS: dict[str, Callable[..., Any]] = {
    "PreciseBN": functools.partial(PreciseBNCallback, 20),
    "PreciseBN, skip_below": functools.partial(PreciseBNCallback, 20, skip_below=0.0),
    "FreezeBN": functools.partial(FreezeBNCallback, start_epoch=1, precise=PassConfig(20)),
}
EVALUATING: dict[str, Callable[..., Any]] = {
    "MiniBatchInference": functools.partial(MiniBatchInferenceCallback, stages=["validate", "test"]),
    "AdaBN": functools.partial(AdaBNCallback, num_samples=8, log_unadapted=True),
    "AdaBN, online": functools.partial(AdaBNCallback, online=True, prior_samples=4),
}
"""Those that act while the model is evaluated."""

CALLBACKS: dict[str, Callable[..., Any]] = {
    **WITH_A_PASS,
    **EVALUATING,
    "ForecastBN": functools.partial(ForecastBNCallback),
    "BNStatsMonitor": functools.partial(BNStatsMonitor, every_n_batches=1, window=2),
    "BatchLeakageMonitor": functools.partial(BatchLeakageMonitor, 24, log_errors=True),
    "GhostBN": functools.partial(GhostBNCallback, size=3),
    "SyncBN": functools.partial(SyncBNCallback),
    "DomainSpecificBN": functools.partial(DomainSpecificBNCallback, num_domains=2),
    "RoIShuffle": functools.partial(RoIShuffleCallback, modules="bn*"),
}
"""Every callback, with arguments that make it act within two epochs of four batches of eight."""

OBSERVING: dict[str, Callable[[], Any]] = {
    "PreciseBN": CALLBACKS["PreciseBN"],
    "PreciseBN, replay": functools.partial(PreciseBNCallback, 20, source="replay"),
    "PreciseBN, forward": functools.partial(PreciseBNCallback, 20, forward="forward"),
    "ForecastBN": CALLBACKS["ForecastBN"],
    "PreciseBN, skip_below": CALLBACKS["PreciseBN, skip_below"],
    "FreezeBN before its switch": functools.partial(
        FreezeBNCallback, start_step=10**6, warmup_steps=0, precise=PassConfig(source="replay")
    ),
    "BNStatsMonitor": CALLBACKS["BNStatsMonitor"],
    "BatchLeakageMonitor": CALLBACKS["BatchLeakageMonitor"],
    **EVALUATING,
}
"""Those that must not change the training."""

RUNNING_THE_STEP = ["PreciseBN, replay", "BNStatsMonitor", "BatchLeakageMonitor"]
"""Those that read no loader: they may only disturb what a training step uses."""


def patterns_of(make: Any) -> str:
    return "modules" if "modules" in inspect.signature(make.func).parameters else "layers"


every_callback = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
every_evaluating = pytest.mark.parametrize("make", EVALUATING.values(), ids=EVALUATING)
every_pass = pytest.mark.parametrize("make", WITH_A_PASS.values(), ids=WITH_A_PASS)


# ------------------------------------------------------------------------------------------------------------- law 2
class Counting(Sampler[int]):
    """An order that a sampler derives from its counter: different each time."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter([(i * 5 + self.epoch) % self.size for i in range(self.size)])

    def __len__(self) -> int:
        return self.size


class ShufflingInPlace(Sampler[int]):
    """An order that the sampler keeps, as a list or an array, and shuffles in place."""

    def __init__(self, size: int, array: bool) -> None:
        self.order: Any = np.arange(size) if array else list(range(size))
        self.rng = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        self.rng.shuffle(self.order)
        return iter([int(i) for i in self.order])

    def __len__(self) -> int:
        return len(self.order)


class Nested:
    """An augmentation deep inside the dataset, as in a Compose, with its own generators."""

    def __init__(self) -> None:
        self.transforms = [Noise(np.random.default_rng(0)), Noise(np.random.RandomState(0)), Noise(random.Random(0))]

    def __call__(self, image: Tensor) -> Tensor:
        for transform in self.transforms:
            image = transform(image)
        return image


class Noise:
    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self, image: Tensor) -> Tensor:
        return image + float(self.rng.normal() if hasattr(self.rng, "normal") else self.rng.random())


class Stream(IterableDataset[Any]):
    """Images in another order every time, from a counter of the dataset."""

    def __init__(self) -> None:
        self.images, self.times = Images(32), 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return (self.images[(i * 7 + self.times) % 32] for i in range(32))


class AugmentsOnDevice(TinyNet):
    """Augments only while the Trainer trains, as modules with augmentation on the GPU do."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x + torch.randn_like(x) if self.trainer.training else x), y


class AugmentingData(TinyData):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + float(self.rng.normal()), batch[1]


def collate_with_own_generators() -> Callable[[list[Any]], Any]:
    rng = random.Random(0)

    def collate(items: list[Any], scale: float, shift: Any) -> Any:
        x, y = torch.utils.data.default_collate(items)
        return scale * x + rng.random() + shift.rng.normal(), y

    return functools.partial(collate, scale=2.0, shift=Noise(np.random.RandomState(0)))


class TwoLoaders(TinyNet):
    def forward(self, x: Any = None, a: Any = None, b: Any = None) -> Tensor:
        return super().forward(x if a is None else a[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


@dataclass
class Setup:
    """One way to train: a module, a loader and arguments of the Trainer."""

    module: Callable[[], LightningModule] = TinyNet
    train: Callable[[], Any] = train_loader
    val: Callable[[], Any] = val_loader
    trainer: dict[str, Any] = field(default_factory=dict)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def loader(**kwargs: Any) -> Callable[[], Any]:
    """A loader with ``kwargs``, of which functions are called each time, so that no two runs share an object."""
    return lambda: train_loader(**{key: v() if key in _MADE else v for key, v in kwargs.items()})


_MADE = ("sampler", "generator")
ACCUMULATING = {"accumulate_grad_batches": 2}
MID_EPOCH = {"val_check_interval": 2}


def every_noise(image: Tensor) -> Tensor:
    return torch_noise(numpy_noise(python_noise(image)))


SETUPS = {
    "dropout, mid-epoch validation": Setup(functools.partial(TinyNet, 0.5), loader(shuffle=True), trainer=MID_EPOCH),
    "shuffle, own generator": Setup(train=loader(shuffle=True, generator=own_generator), trainer=MID_EPOCH),
    "random sampler with generator": Setup(
        train=loader(sampler=lambda: RandomSampler(range(32), replacement=True, generator=own_generator()))
    ),
    "counting sampler": Setup(train=loader(sampler=lambda: Counting(32)), trainer=MID_EPOCH),
    "list shuffled in place": Setup(train=loader(sampler=lambda: ShufflingInPlace(32, False))),
    "array shuffled in place": Setup(train=loader(sampler=lambda: ShufflingInPlace(32, True))),
    "iterable dataset, workers": Setup(train=lambda: DataLoader(Stream(), 8, num_workers=1)),
    "persistent workers": Setup(
        train=loader(shuffle=True, num_workers=2, persistent_workers=True, augment=numpy_noise), trainer=MID_EPOCH
    ),
    "persistent workers, own generator": Setup(
        train=loader(shuffle=True, num_workers=1, persistent_workers=True, generator=own_generator)
    ),
    "augmentation": Setup(train=loader(shuffle=True, augment=every_noise), trainer=MID_EPOCH),
    "augmentation with own generators": Setup(train=lambda: train_loader(augment=Nested()), trainer=MID_EPOCH),
    "augmentation in a collate function": Setup(
        train=lambda: train_loader(collate_fn=collate_with_own_generators()), trainer=MID_EPOCH
    ),
    "augmentation on the device": Setup(AugmentsOnDevice),
    "augmentation on the device by a data module": Setup(train=AugmentingData),
    "validation in mid-accumulation": Setup(trainer={**ACCUMULATING, "val_check_interval": 1}),
    "bf16-mixed": Setup(functools.partial(TinyNet, 0.5), trainer={"precision": "bf16-mixed"}),
    "two loaders": Setup(TwoLoaders, lambda: {"a": train_loader(shuffle=True), "b": train_loader(24)}),
    "no validation": Setup(train=loader(shuffle=True), val=lambda: None),
    "reloading": Setup(train=loader(shuffle=True), trainer={"reload_dataloaders_every_n_epochs": 1}),
    "max_steps in mid-epoch": Setup(trainer={"max_epochs": -1, "max_steps": 6}),
    "momentum encoder": Setup(functools.partial(MomentumEncoder, lerp)),
    "momentum encoder, through data": Setup(functools.partial(MomentumEncoder, lerp_data)),
    "momentum encoder, other data": Setup(functools.partial(MomentumEncoder, other_data, student_first=True)),
}


def trace(setup: Setup, callback: Any = None) -> list[tuple[str, Any]]:
    recorder = Recorder()
    fit(setup.module(), [callback, recorder] if callback else [recorder], setup.train(), setup.val(), **setup.trainer)
    return recorder.trace


@functools.cache
def undisturbed(name: str) -> list[tuple[str, Any]]:
    return trace(SETUPS[name])


A_FEW = ["dropout, mid-epoch validation", "validation in mid-accumulation"]
OF_THE_STEP = [
    *A_FEW,
    "two loaders",
    "momentum encoder, through data",
    "augmentation on the device",
    "bf16-mixed",
    "no validation",
    "momentum encoder",
    "momentum encoder, other data",
]
WAYS = {"PreciseBN": list(SETUPS), **dict.fromkeys(RUNNING_THE_STEP, OF_THE_STEP)}


@pytest.mark.parametrize(("observer", "name"), [(o, n) for o in OBSERVING for n in WAYS.get(o, A_FEW)])
def test_training_is_bit_for_bit_the_same_with_and_without(observer: str, name: str) -> None:
    callback = OBSERVING[observer]()
    observed = trace(SETUPS[name], callback)
    if isinstance(callback, (PreciseBNCallback, BatchLeakageMonitor)):
        assert callback.result is not None, "no pass was run: this test shows nothing"
    for ours, theirs in zip(observed, undisturbed(name), strict=True):
        assert ours == theirs


class Warns(TinyNet):
    """Its step warns, and lets torch and Lightning warn."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        warnings.warn("the author warns", stacklevel=1)
        torch.tensor(batch[0])
        rank_zero_warn("Lightning warns")
        return super().training_step(batch, batch_idx)


def warnings_shown(make: Callable[[], Any], epochs: int) -> Counter[str]:
    """Count each warning under the default filter: once for each place."""
    Warns.training_step.__globals__.pop("__warningregistry__", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit(Warns(), make(), max_epochs=epochs)
    return Counter(str(w.message) for w in caught)


@pytest.mark.parametrize("observer", OBSERVING)
def test_a_warning_that_is_shown_once_is_not_shown_again_for_every_pass(observer: str) -> None:
    few, many = (warnings_shown(OBSERVING[observer], epochs) for epochs in (2, 4))
    assert sorted(many.values()) == sorted(few.values())
    assert few["the author warns"] == 1
    assert few["Lightning warns"] <= 2  # it shows the caller of the step, which differs in a pass
    assert sum(n for text, n in few.items() if "copy construct" in text) == 1


# ------------------------------------------------------------------------------------------------------------- law 1
class Shown:
    """An object that a pass cannot restore, to record what happens inside a pass."""

    def __init__(self) -> None:
        self.batches = 0
        self.found: list[Any] = []


class Peeking(TinyNet):
    """Calls ``look`` at itself in every training step, those of a pass included."""

    def __init__(self, look: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.shown, self.look = Shown(), look

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.shown.batches += 1
        self.shown.found.append(self.look(self))
        return super().training_step(batch, batch_idx)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "look": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        return twin


class AtEveryMoment(Callback):
    def __init__(self, look: Callable[[nn.Module], Any]) -> None:
        self.look, self.found = look, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.found.append(self.look(pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found.append(self.look(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found.append(self.look(pl_module))


def shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(key, value.shape) for key, value in module.state_dict().items()]


def pickled(o: Any) -> Any:
    return pickle.loads(pickle.dumps(o))


COPIES = {"pickled": pickled, "deep copy": copy.deepcopy}


def looked_at(module: nn.Module) -> dict[str, Any]:
    """What must equal a plain module's: keys and shapes of the state dict; classes, attributes and values of a copy."""
    found: dict[str, Any] = {"shapes": shapes(module)}
    for name, copy_of in COPIES.items():
        twin = copy_of(module)
        classes = [type(m) for m in twin.modules()][1:]
        same = digest(list(twin.parameters())) == digest(list(module.parameters()))
        found[name] = classes, same, sorted(vars(twin.bn1))
    return found


@every_callback
def test_at_every_moment_the_model_has_the_keys_of_the_plain_one_and_copies_as_it(make: Callable[[], Any]) -> None:
    between, module = AtEveryMoment(looked_at), Peeking(looked_at)
    fit(module, [make(), between])
    plain = looked_at(Peeking(looked_at))
    assert plain["shapes"] == shapes(TinyNet())
    assert module.shown.batches > 8 or make not in WITH_A_PASS.values(), "no pass was run"
    for found in between.found + module.shown.found:
        assert found == plain


@every_callback
def test_the_callback_copies_before_between_and_after(make: Callable[[], Any]) -> None:
    def copies(_: Any) -> bool:
        state = digest(callback.state_dict())
        return all(digest(copy_of(callback).state_dict()) == state for copy_of in COPIES.values())

    callback, between = make(), AtEveryMoment(copies)
    assert copies(None)
    fit(TinyNet(), [callback, between])
    assert len(between.found) > 8 and all(between.found)
    for copy_of in COPIES.values():
        fit(TinyNet(), copy_of(callback))  # a copy of a used callback works


@every_callback
def test_checkpoints_load_strictly_and_safely_into_the_plain_model(make: Callable[[], Any], tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    trainer = fit(TinyNet(), [make(), saving], enable_checkpointing=True)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == trainer.global_step
    for path in checkpoints:
        checkpoint = torch.load(path, weights_only=True)
        assert TinyNet().load_state_dict(checkpoint["state_dict"], strict=True)


def batches_for_a_pass(trainer: Trainer) -> Any:
    return train_loader(16)


def run_on(module: LightningModule, batch: Any) -> Any:
    return module(batch[0])


def samples(batch: Any) -> int:
    return len(batch[0])


@every_callback
def test_the_command_line_makes_it_with_every_option(make: Any, tmp_path: Path) -> None:
    option = patterns_of(make)
    options = {key: value for key, value in make.keywords.items() if key != "precise"} | {option: ["bn*"]}
    if "batch_size_fn" in inspect.signature(make.func).parameters:
        options |= {"batch_size_fn": f"{__name__}.samples"}
    own_pass = {"source": {"fn": f"{__name__}.batches_for_a_pass"}, "forward": f"{__name__}.run_on"}
    if make.func is PreciseBNCallback:
        options |= own_pass
    elif make.func is FreezeBNCallback:
        options |= {"precise": {"num_samples": 20, **own_pass}}
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
    if make in WITH_A_PASS.values():
        used = callback.config if make.func is PreciseBNCallback else callback.precise
        assert (used.source, used.forward) == (FromLoader(batches_for_a_pass), run_on)


# ------------------------------------------------------------------------------------------------------------- law 3
class Blown(Exception):
    pass


class Fuse(TinyNet):
    """Raises in the ``n``-th call of its training step."""

    def __init__(self, error: BaseException, n: int) -> None:
        super().__init__()
        self.error, self.n, self.shown = error, n, Shown()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.shown.batches += 1
        if self.shown.batches == self.n:
            raise self.error
        return super().training_step(batch, batch_idx)


def everything(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    return {
        "modules": {n: (type(m), sorted(vars(m)), m.training, hooks_of(m)) for n, m in module.named_modules()},
        "momentum": [module.bn1.momentum, module.bn2.momentum],
        "buffers": digest(module.state_dict()),
        "attributes": state_but_statistics(module),
        "random numbers": digest(list(random_states())),
        "trainer": (trainer.loggers, trainer.state.stage),
        "optimizers": [(o.param_groups[0]["lr"], *map(len, hooks_of(o).values())) for o in trainer.optimizers],
    }


def hooks_of(o: Any) -> dict[str, list[int]]:
    return {name: list(hooks) for name, hooks in vars(o).items() if name.endswith("hooks") and isinstance(hooks, dict)}


class BeforeAndAfter(Callback):
    """Records everything before each hook in which a pass may run, and after an exception."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def look(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before = everything(trainer, pl_module)

    on_train_batch_start = on_validation_batch_start = on_train_epoch_end = look

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.after = everything(trainer, pl_module)


@pytest.fixture
def _interrupt_works_afterwards() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)  # Lightning ignores it once it was pressed


@every_pass
@pytest.mark.parametrize(
    ("error", "comes_out", "val"),
    [(Blown(), Blown, True), (KeyboardInterrupt(), SystemExit, False), (StopIteration(), RuntimeError, True)],
    ids=["exception", "Ctrl-C, not validating", "StopIteration"],
)
@pytest.mark.usefixtures("_interrupt_works_afterwards")
def test_an_exception_in_a_pass_leaves_everything_as_it_was(
    make: Callable[..., Any], error: BaseException, comes_out: type[BaseException], val: bool
) -> None:
    probe, module, callback = BeforeAndAfter(), Fuse(error, n=6), make()  # the second batch of the first pass
    callback.on_error = "raise"
    with pytest.raises(comes_out):
        fit(module, [probe, callback], val="default" if val else None)
    assert module.shown.batches == 6
    assert probe.before and probe.after == probe.before


class FuseInEvaluation(TinyNet):
    """Raises in the second batch of an evaluation, but not in a pass, in which loggers are muted."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def blow(self, batch_idx: int) -> None:
        if batch_idx == 1 and not in_a_pass(self):
            raise self.error

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.blow(batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.blow(batch_idx)
        return super().predict_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.blow(batch_idx)


def left_by_evaluating(callbacks: list[Any], stage: str, error: BaseException, comes_out: Any) -> Any:
    """The module, its values and modes, and the random states after a failed evaluation."""
    module = FuseInEvaluation(error)
    trainer = trainer_with(callbacks)
    seed_everything(0, verbose=False)
    with pytest.raises(comes_out):
        getattr(trainer, stage)(module, val_loader())
    modules = [(n, type(m), repr(m), sorted(vars(m)), m.training, hooks_of(m)) for n, m in module.named_modules()]
    return modules, digest(module.state_dict()), digest(list(random_states()))


@every_evaluating
@pytest.mark.parametrize(
    ("stage", "error", "comes_out"),
    [("validate", Blown(), Blown), ("test", KeyboardInterrupt(), SystemExit), ("predict", Blown(), Blown)],
)
@pytest.mark.usefixtures("_interrupt_works_afterwards")
def test_an_exception_in_an_evaluation_leaves_what_it_leaves_without(
    make: Callable[[], Any], stage: str, error: BaseException, comes_out: type[BaseException]
) -> None:
    plain = left_by_evaluating([], stage, error, comes_out)
    assert left_by_evaluating([make()], stage, error, comes_out) == plain


def left_by(module: TinyNet, callbacks: list[Any]) -> list[Any]:
    with contextlib.suppress(Blown):
        fit(module, callbacks)
    return [(n, type(m), repr(m), sorted(vars(m)), m.training, hooks_of(m)) for n, m in module.named_modules()]


@every_callback
@pytest.mark.parametrize("fails", [False, True], ids=["end", "exception"])
def test_nothing_is_left_after_a_fit(make: Callable[[], Any], fails: bool) -> None:
    """The exception comes in the third batch of the second epoch, after a pass of three batches."""
    in_a_pass = 3 if make in WITH_A_PASS.values() else 0
    ours, plain = (Fuse(Blown(), n=4 + more + 3 if fails else -1) for more in (in_a_pass, 0))
    assert left_by(ours, [make()]) == left_by(plain, [])


# ------------------------------------------------------------------------------------------------------------- law 4
class RightAfterAPass(Callback):
    """The second epoch's statistics before its first forwards, in which DDP broadcasts those of rank 0."""

    def __init__(self) -> None:
        self.statistics: list[dict[str, Tensor]] = []

    def look(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 0):
            self.statistics.append(statistics_of(pl_module))

    on_train_batch_start = on_validation_batch_start = look


def fit_on_rank(name: str, world_size: int) -> dict[str, Any]:
    module, callback, after = TinyNet(), CALLBACKS[name](), RightAfterAPass()
    loader = train_loader(size=44, batch_size=4)
    fit(module, [callback, after], loader, devices=world_size, strategy="ddp")
    return {
        "after a pass": digest(after.statistics),
        "at the end": digest(module.state_dict()),
        "state": {k: v for k, v in callback.state_dict().items() if k != "forecast"},  # only rank 0 has one
        "passes": len(after.statistics),
    }


@pytest.mark.ddp
@pytest.mark.parametrize("name", [*WITH_A_PASS, "SyncBN", "ForecastBN"])
def test_ranks_agree_on_what_is_written(name: str) -> None:
    first, second = run_on_ranks(fit_on_rank, 2, name, 2)
    assert first["passes"] == 2
    assert first == second


# ------------------------------------------------------------------------------------------------------------- law 5
class StateAtStart(Callback):
    """The state of the callback when training starts, after a checkpoint was restored."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.state = callback, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = copy.deepcopy(self.callback.state_dict())


RESUMED: dict[str, Callable[[], Any]] = {
    "PreciseBN": functools.partial(PreciseBNCallback, 20, every_n_validations=2),
    "ForecastBN": CALLBACKS["ForecastBN"],
    "PreciseBN, skip_below": functools.partial(PreciseBNCallback, 20, skip_below=0.3),
    "FreezeBN before the switch": functools.partial(
        FreezeBNCallback, start_step=8, precise=PassConfig(20), warmup_epochs=1.5
    ),
    "FreezeBN after the switch": functools.partial(
        FreezeBNCallback, start_step=3, precise=PassConfig(20), warmup_epochs=1.5
    ),
    "BNStatsMonitor": functools.partial(BNStatsMonitor, every_n_batches=2, window=2),
    "BatchLeakageMonitor": functools.partial(BatchLeakageMonitor, 24),
    "GhostBN": CALLBACKS["GhostBN"],
    "SyncBN": CALLBACKS["SyncBN"],
    "DomainSpecificBN": functools.partial(DomainSpecificBNCallback, num_domains=3, domain_fn=operator.itemgetter(1)),
    "RoIShuffle": CALLBACKS["RoIShuffle"],
    "FreezeBN, affine, on EMA": functools.partial(FreezeBNCallback, start_step=3, statistics="ema", affine=True),
}


class SavesAtEveryMoment(Checkpoint):
    """Writes ``batch-5.ckpt`` after the fifth batch, and so on: at the three moments of `ModelCheckpoint`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, moment: str, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / f"{moment}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save("batch", trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.save("validation", trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save("epoch", trainer)


def fit_with_checkpoints(module: TinyNet, callbacks: list[Any], folder: Path, **kwargs: Any) -> None:
    """Three epochs of four equal batches: Lightning repeats the first batches of a resumed epoch."""
    loader = DataLoader(torch.utils.data.ConcatDataset([Images(8)] * 4), 8)
    trainer = {"max_epochs": 3, "enable_checkpointing": True, "val_check_interval": 2}
    fit(module, [*callbacks, SavesAtEveryMoment(folder)], loader, **trainer, **kwargs)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """From a checkpoint of each moment, as if the training had been killed right after it."""
    uninterrupted, whole = TinyNet(), RESUMED[name]()
    fit_with_checkpoints(uninterrupted, [whole], tmp_path)
    for last in ("batch-5", "validation-6", "validation-8", "epoch-8"):
        checkpoint = tmp_path / f"{last}.ckpt"
        resumed, callback = TinyNet(), RESUMED[name]()
        at_start = StateAtStart(callback)
        fit_with_checkpoints(resumed, [at_start, callback], tmp_path / f"from {last}", ckpt_path=checkpoint)
        saved = torch.load(checkpoint, weights_only=True)["callbacks"].get(callback.state_key, {})
        assert digest(at_start.state) == digest(saved), last
        assert digest(callback.state_dict()) == digest(whole.state_dict()), last
        assert digest(resumed.state_dict()) == digest(uninterrupted.state_dict()), last


RESUMED_AT_A_BATCHS_END: dict[str, Callable[[], list[Any]]] = {
    # a leakage monitor loses the batches of the interrupted epoch
    **{name: lambda make=make: [make()] for name, make in RESUMED.items() if name != "BatchLeakageMonitor"},
    "PreciseBN, every third": lambda: [PreciseBNCallback(20, every_n_validations=3)],
    "ForecastBN, every second": lambda: [ForecastBNCallback(2)],
    "PreciseBN before FreezeBN": lambda: [PreciseBNCallback(20), FreezeBNCallback(start_step=4, statistics="ema")],
    "FreezeBN before PreciseBN": lambda: [FreezeBNCallback(start_step=4, statistics="ema"), PreciseBNCallback(20)],
}
WITH_A_PHASE = ["PreciseBN, every third", "ForecastBN, every second", "PreciseBN before FreezeBN"]
"""Those whose passes depend on the number of validations."""
VALIDATING: dict[str, dict[str, Any]] = {
    "validating": {},
    "validating twice an epoch": {"val_check_interval": 2},
    "validating every second epoch": {"check_val_every_n_epoch": 2},
    "not validating": {"limit_val_batches": 0},
}


def fit_saving_at_batch_ends(callbacks: list[Any], folder: Path, **kwargs: Any) -> tuple[TinyNet, list[Any]]:
    """Three epochs of four equal batches, with a checkpoint after every second batch."""
    module = TinyNet()
    loader = DataLoader(torch.utils.data.ConcatDataset([Images(8)] * 4), 8)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(module, [*callbacks, saving], loader, max_epochs=3, enable_checkpointing=True, **kwargs)
    return module, callbacks


@pytest.mark.parametrize(
    ("name", "validating"),
    [(n, v) for n in RESUMED_AT_A_BATCHS_END for v in VALIDATING if n in WITH_A_PHASE or v == "validating"],
)
def test_a_fit_resumed_at_a_batchs_end_ends_as_the_uninterrupted_one(
    name: str, validating: str, tmp_path: Path
) -> None:
    """Such a checkpoint is written before the validation and the epoch's end, which a resumed fit skips."""
    make, kwargs = RESUMED_AT_A_BATCHS_END[name], VALIDATING[validating]
    module, callbacks = fit_saving_at_batch_ends(make(), tmp_path / "whole", **kwargs)
    for step in (4, 6, 12) if name in WITH_A_PHASE else (4,):
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        resumed, ours = fit_saving_at_batch_ends(make(), tmp_path / f"from {step}", ckpt_path=checkpoint, **kwargs)
        assert [digest(c.state_dict()) for c in ours] == [digest(c.state_dict()) for c in callbacks], step
        assert digest(resumed.state_dict()) == digest(module.state_dict()), step


# ------------------------------------------------------------------------------------------------------------- law 7
@every_callback
def test_a_second_fit_starts_afresh(make: Callable[[], Any]) -> None:
    used, fresh = make(), make()
    fit(TinyNet(), used)
    modules = TinyNet(), TinyNet()
    for callback, module in zip((used, fresh), modules, strict=True):
        fit(module, callback, val=None)
    assert digest(used.state_dict()) == digest(fresh.state_dict())
    assert digest(modules[0].state_dict()) == digest(modules[1].state_dict())


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
        found = super().__getattr__(name)
        return functools.partial(self._scaled, found) if name == "conv2" else found

    def _scaled(self, conv: nn.Module, x: Tensor) -> Tensor:
        return conv(x * (1 + self.kept))  # another micro-batch has overwritten it


def outcome_of(callback: Any, module: TinyNet) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, callback)
    return {
        "model": digest(module.state_dict()),
        "state": digest(callback.state_dict()),
        "result": repr(getattr(callback, "result", None)),
        "logged": [
            (step, {k: repr(v) for k, v in row.items() if not k.endswith("seconds")})
            for step, row in trainer.logger.rows
        ],
        "warnings": [str(w.message) for w in caught],
    }


@every_callback
@pytest.mark.parametrize(
    "models", [(Keeps, TinyNet), (TinyNet, Keeps)], ids=["from a stateful one", "to a stateful one"]
)
def test_one_callback_over_two_models_is_as_two_callbacks(make: Callable[[], Any], models: Any) -> None:
    first, second = models
    used = make()
    fit(first(), used)
    assert outcome_of(used, second()) == outcome_of(make(), second())


# ------------------------------------------------------------------------------------------------------------- law 6
class WithoutBatchNorm(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 6)


@every_callback
def test_a_model_without_batchnorm_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="WithoutBatchNorm has no BatchNorm layer"):
        fit(WithoutBatchNorm(), make())


@every_callback
def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are(make: Callable[..., Any]) -> None:
    option = patterns_of(make)
    match = rf"{option}='backbone\.\*' matches no (BatchNorm layer|module) of TinyNet.*bn1.* bn2"
    with pytest.raises(ValueError, match=match):
        fit(TinyNet(), make(**{option: "backbone.*"}))


@every_callback
def test_two_on_one_layer_are_refused_by_its_name(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"Two \w+s act on layer 'bn2' \(1 in all\).*do not overlap"):
        fit(TinyNet(), [make(**{patterns_of(make): patterns}) for patterns in ("bn*", "bn2")])


@every_callback
def test_two_on_different_layers_work_and_keep_their_own_state(make: Callable[..., Any], tmp_path: Path) -> None:
    first, second = (make(**{patterns_of(make): patterns}) for patterns in ("bn1", ["bn2"]))
    callbacks = [first, second, ModelCheckpoint(tmp_path)]
    trainer = fit(TinyNet(), callbacks, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert all(digest(states.get(c.state_key, {})) == digest(c.state_dict()) for c in callbacks[:2])
    assert callbacks[0].state_key != callbacks[1].state_key


@every_pass
def test_with_nothing_to_do_it_warns_once_and_changes_nothing(make: Callable[..., Any]) -> None:
    module, before = TinyNet(), statistics_of(TinyNet())
    module.bn1.eval(), module.bn2.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, make())
    assert sum("all of its layers are frozen" in str(w.message) for w in caught) == 1
    assert digest(statistics_of(module)) == digest(before)


# ------------------------------------------------------------------------------------------------ pytorch_lightning
class Elsewhere(pytorch_lightning.LightningModule):
    """A module of pytorch_lightning, whose classes are no subclasses of lightning.pytorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
        self.shown = Shown()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.shown.batches += 1
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@every_callback
def test_it_works_in_a_trainer_of_pytorch_lightning(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[make(**{patterns_of(make): "net.*"})],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Elsewhere()
    trainer.fit(module, train_loader(), val_loader())
    # no pass, one or two; the first pass runs its first batch three times
    assert module.shown.batches in (8, 8 + 3, 8 + 5, 8 + 5 + 3, 8 + 2 * 4)


@every_evaluating
def test_it_evaluates_in_a_trainer_of_pytorch_lightning(make: Callable[[], Any], tmp_path: Path) -> None:
    class Tested(Elsewhere):
        test_step = Elsewhere.validation_step

    results = []
    for callbacks in ([], [make()]):
        torch.manual_seed(0)
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Tested()
        before = digest(module.state_dict())
        results += trainer.test(module, val_loader(), verbose=False)
        assert digest(module.state_dict()) == before
        unadapted = {
            key.removeprefix("unadapted/"): v for c in callbacks for key, v in vars(c).get("unadapted", {}).items()
        }
        assert not unadapted or unadapted == results[0]
    assert results[0] != results[1]
