"""Laws of every callback, I: training is not changed, failures leave nothing, ranks agree.

A new callback joins by one line in `tests.callbacks.zoo.CALLBACKS`. The other laws are in test_laws_of_state.py.
"""

import contextlib
import functools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler

from lightning_bn import BatchLeakageMonitor, FreezeBNCallback, FromLoader, PassConfig, PreciseBNCallback
from tests.callbacks import zoo
from tests.callbacks.zoo import (
    CALLBACKS,
    EVALUATING,
    WITH_A_PASS,
    At,
    TinyNet,
    digest,
    every_callback,
    every_pass,
    fit,
    in_a_pass,
    train_loader,
)
from tests.ranks import run_on_ranks


def live(trainer: Trainer) -> Any:
    return trainer.train_dataloader


OBSERVING: dict[str, Callable[[], Any]] = {
    **{n: CALLBACKS[n] for n in ("PreciseBN", "PreciseBN, skip_below", "ForecastBN", "BNStatsMonitor")},
    "PreciseBN, replay": functools.partial(PreciseBNCallback, 20, source="replay"),
    "PreciseBN, live loader": functools.partial(PreciseBNCallback, 20, source=FromLoader(live)),
    "PreciseBN, forward": functools.partial(PreciseBNCallback, 20, forward="forward"),
    "FreezeBN before its switch": functools.partial(
        FreezeBNCallback, start_step=10**6, warmup_steps=0, precise=PassConfig(source="replay")
    ),
    "BatchLeakageMonitor": CALLBACKS["BatchLeakageMonitor"],
    **EVALUATING,
}
"""Those that must not change the training."""

every_evaluating = pytest.mark.parametrize("make", EVALUATING.values(), ids=EVALUATING)


class Shuffles(Sampler[int]):
    """An order from a counter, and from a list and an array that the sampler shuffles in place."""

    def __init__(self) -> None:
        self.order, self.array, self.epoch = list(range(32)), np.arange(32), 0
        self.rng = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        self.rng.shuffle(self.order)
        self.rng.shuffle(self.array)
        return iter([self.order[(int(i) + self.epoch) % 32] for i in self.array])

    def __len__(self) -> int:
        return 32


class Noise:
    """An augmentation with a generator of its own, as it is deep inside of a Compose."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self, image: Tensor) -> Tensor:
        return image + float(self.rng.normal() if hasattr(self.rng, "normal") else self.rng.random())


class Nested:
    def __init__(self) -> None:
        self.transforms = [Noise(np.random.default_rng(0)), Noise(np.random.RandomState(0)), Noise(random.Random(0))]

    def __call__(self, image: Tensor) -> Tensor:
        return functools.reduce(lambda x, transform: transform(x), self.transforms, image)


class Stream(IterableDataset[Any]):
    """Images in another order every time, from a counter of the dataset."""

    def __init__(self) -> None:
        self.images, self.times = zoo.Images(32), 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return (self.images[(i * 7 + self.times) % 32] for i in range(32))


class AugmentsOnDevice(TinyNet):
    """Augments only while the Trainer trains, as modules with augmentation on the GPU do."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] + torch.randn_like(batch[0]) if self.trainer.training else batch[0]), batch[1]


class TwoLoaders(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def every_noise(image: Tensor) -> Tensor:
    return zoo.torch_noise(image * random.uniform(0.5, 1.5) + float(np.random.randn()))


MID_EPOCH = {"val_check_interval": 2}
WORKER = {"num_workers": 1, "persistent_workers": True}
shuffled = functools.partial(train_loader, shuffle=True)

SETUPS: dict[str, Callable[[], tuple[LightningModule, dict[str, Any]]]] = {
    "dropout, mid-epoch validation": lambda: (TinyNet(0.5), {"train": shuffled(), **MID_EPOCH}),
    "shuffle, own generator": lambda: (TinyNet(), {"train": shuffled(generator=own_generator()), **MID_EPOCH}),
    "random sampler with generator": lambda: (
        TinyNet(),
        {"train": train_loader(sampler=RandomSampler(range(32), replacement=True, generator=own_generator()))},
    ),
    "sampler with a state": lambda: (TinyNet(), {"train": train_loader(sampler=Shuffles()), **MID_EPOCH}),
    "iterable dataset, workers": lambda: (TinyNet(), {"train": DataLoader(Stream(), 8, num_workers=1)}),
    "persistent workers": lambda: (TinyNet(), {"train": shuffled(augment=every_noise, **WORKER), **MID_EPOCH}),
    "workers, own generator": lambda: (TinyNet(), {"train": shuffled(generator=own_generator(), **WORKER)}),
    "augmentation": lambda: (TinyNet(), {"train": shuffled(augment=every_noise), **MID_EPOCH}),
    "augmentation with own generators": lambda: (TinyNet(), {"train": train_loader(augment=Nested()), **MID_EPOCH}),
    "augmentation on the device": lambda: (AugmentsOnDevice(), {}),
    "mid-accumulation": lambda: (TinyNet(), {"accumulate_grad_batches": 2, "val_check_interval": 1}),
    "bf16-mixed": lambda: (TinyNet(0.5), {"precision": "bf16-mixed"}),
    "two loaders": lambda: (TwoLoaders(), {"train": {"a": shuffled(), "b": train_loader(24)}}),
    "no validation": lambda: (TinyNet(), {"train": shuffled(), "val": None}),
    "reloading, max_steps in mid-epoch": lambda: (
        TinyNet(),
        {"train": shuffled(), "reload_dataloaders_every_n_epochs": 1, "max_epochs": -1, "max_steps": 6},
    ),
    "momentum encoder": lambda: (zoo.MomentumEncoder(zoo.lerp_data), {}),
    "momentum encoder, other data": lambda: (zoo.MomentumEncoder(zoo.other_data, student_first=True), {}),
}
"""Ways to train: a module, and what `fit` is given besides."""
A_FEW = ["dropout, mid-epoch validation", "mid-accumulation"]
OF_THE_STEP = ["two loaders", "augmentation on the device", "bf16-mixed", "no validation"]
OF_THE_STEP += [*A_FEW, "momentum encoder", "momentum encoder, other data"]
RUNNING_THE_STEP = ["PreciseBN, replay", "BNStatsMonitor", "BatchLeakageMonitor"]
"""Those that read no loader: they may only disturb what a training step uses."""
READING = {"PreciseBN": list(SETUPS), "PreciseBN, live loader": [*A_FEW, "persistent workers"]}
WAYS = {**READING, **dict.fromkeys(RUNNING_THE_STEP, OF_THE_STEP)}


def trace(name: str, callbacks: list[Any]) -> list[tuple[str, Any]]:
    (module, options), recorder = SETUPS[name](), zoo.Recorder()
    fit(module, [*callbacks, recorder], **options)
    return recorder.trace


@functools.cache
def undisturbed(name: str) -> list[tuple[str, Any]]:
    return trace(name, [])


@pytest.mark.parametrize(("observer", "name"), [(o, n) for o in OBSERVING for n in WAYS.get(o, A_FEW)])
def test_training_is_bit_for_bit_the_same_with_and_without(observer: str, name: str) -> None:
    callback = OBSERVING[observer]()
    observed = trace(name, [callback])
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
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        fit(Warns(), make(), max_epochs=epochs)
    return Counter(str(w.message) for w in record)


@pytest.mark.parametrize("observer", OBSERVING)
def test_a_warning_that_is_shown_once_is_not_shown_again_for_every_pass(observer: str) -> None:
    few, many = (warnings_shown(OBSERVING[observer], epochs) for epochs in (2, 3))
    assert sorted(many.values()) == sorted(few.values()) and few["the author warns"] == 1
    assert few["Lightning warns"] <= 2  # it shows the caller of the step, which differs in a pass
    assert sum(n for text, n in few.items() if "copy construct" in text) == 1


class Blown(Exception):
    pass


class Blows(TinyNet):
    """Raises in the passes of all epochs but the first ones, or in the ``n``-th training step outside of passes."""

    def __init__(self, error: BaseException, after: int = 1, n: int = -1) -> None:
        super().__init__()
        self.error, self.after, self.n = error, after, n

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if in_a_pass(self):
            blows = self.n < 0 and self.trainer.current_epoch >= self.after and batch_idx == 1
        else:
            blows = self.trainer.global_step == self.n
        if blows:
            raise self.error
        return super().training_step(batch, batch_idx)


def hooks_of(o: Any) -> dict[str, list[int]]:
    return {name: list(hooks) for name, hooks in vars(o).items() if name.endswith("hooks") and isinstance(hooks, dict)}


def modules_of(module: nn.Module) -> list[Any]:
    return [(n, type(m), repr(m), sorted(vars(m)), m.training, hooks_of(m)) for n, m in module.named_modules()]


class BeforeAndAfter(Callback):
    """Records everything before each hook in which a pass may run, and after an exception."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def everything(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        return {
            "modules": [(n, t, *rest) for n, t, _, *rest in modules_of(module)],
            "momentum": [module.bn1.momentum, module.bn2.momentum],
            "buffers": digest(module.state_dict()),
            "attributes": zoo.state_but_statistics(module),
            "random numbers": digest(list(zoo.random_states())),
            "trainer": (trainer.loggers, trainer.state.stage),
            "optimizers": [(o.param_groups[0]["lr"], *map(len, hooks_of(o).values())) for o in trainer.optimizers],
        }

    def look(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before = self.everything(trainer, pl_module)

    on_train_batch_start = on_validation_batch_start = on_train_epoch_end = look

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.after = self.everything(trainer, pl_module)


@every_pass
@pytest.mark.parametrize(
    ("error", "comes_out", "on_error"),
    [
        (Blown(), Blown, "raise"),
        (KeyboardInterrupt(), SystemExit, "warn"),
        (StopIteration(), RuntimeError, "raise"),
        (MemoryError("full"), MemoryError, "warn"),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "warn"),
    ],
    ids=["exception", "Ctrl-C, not validating", "StopIteration", "out of memory", "out of device memory"],
)
def test_an_exception_in_a_pass_leaves_nothing_of_it(make: Any, error: Any, comes_out: Any, on_error: str) -> None:
    probe, callback = BeforeAndAfter(), make()
    callback.on_error = on_error
    with pytest.raises(comes_out):
        fit(Blows(error), [probe, callback], val=None if comes_out is SystemExit else "default")
    assert probe.before and probe.after == probe.before


class FuseInEvaluation(TinyNet):
    """Raises in the second batch of an evaluation, but not in a pass, in which loggers are muted."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        self.calls = 0 if in_a_pass(self) else vars(self).get("calls", 0) + 1
        if self.calls == 2:
            raise self.error
        return super().forward(x)


def left_by_evaluating(callbacks: list[Any], stage: str, error: BaseException, comes_out: Any) -> Any:
    """The module, its values and modes, and the random states after a failed evaluation."""
    module = FuseInEvaluation(error)
    trainer = zoo.trainer_with(callbacks)
    seed_everything(0)
    with pytest.raises(comes_out):
        getattr(trainer, stage)(module, zoo.val_loader())
    return modules_of(module), digest(module.state_dict()), digest(list(zoo.random_states()))


@every_evaluating
@pytest.mark.parametrize(
    ("stage", "error", "comes_out"),
    [("validate", Blown(), Blown), ("test", KeyboardInterrupt(), SystemExit), ("predict", Blown(), Blown)],
)
def test_an_exception_in_an_evaluation_leaves_nothing_of_it(make: Any, stage: str, error: Any, comes_out: Any) -> None:
    plain = left_by_evaluating([], stage, error, comes_out)
    assert left_by_evaluating([make()], stage, error, comes_out) == plain


def left_by(n: int, callbacks: list[Any]) -> list[Any]:
    module, ends, rates = Blows(Blown(), n=n), ("on_exception", "on_train_end"), list[float]()
    note = At(lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"]), *ends)
    with contextlib.suppress(Blown):
        fit(module, [*callbacks, note])
    return [rates, modules_of(module)]


@functools.cache
def left_by_none(n: int) -> list[Any]:
    return left_by(n, [])


@every_callback
@pytest.mark.parametrize("n", [100, 6], ids=["end", "exception"])
def test_nothing_is_left_after_a_fit(make: Callable[[], Any], n: int) -> None:
    assert left_by(n, [make()]) == left_by_none(n)


def fit_on_rank(name: str) -> Any:
    """The second epoch's statistics before its first forwards, in which DDP broadcasts those of rank 0; and the end."""
    module, callback, found = TinyNet(), CALLBACKS[name](), []

    def look(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 0):
            found.append(digest(zoo.statistics_of(pl_module)))

    after = At(look, "on_train_batch_start", "on_validation_batch_start")
    fit(module, [callback, after], train_loader(44, 4), devices=2, strategy="ddp")
    state = {k: v for k, v in callback.state_dict().items() if k != "forecast"}  # only rank 0 has one
    return found, digest(module.state_dict()), state


@pytest.mark.ddp
@pytest.mark.parametrize("name", [*WITH_A_PASS, "SyncBN", "ForecastBN"])
def test_ranks_agree_on_what_is_written(name: str) -> None:
    first, second = run_on_ranks(fit_on_rank, 2, name)
    assert len(first[0]) == 2 and first == second
