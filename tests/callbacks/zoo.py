"""All callbacks, and tiny LightningModules and data for their tests: a fit of two epochs takes a tenth of a second."""

import contextlib
import functools
import hashlib
import inspect
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import lightning_bn as lbn

CLASSES = 3


def labels(batch: Any) -> Tensor:
    return batch[1]


WITH_A_PASS: dict[str, Callable[..., Any]] = {
    "PreciseBN": functools.partial(lbn.PreciseBNCallback, 20),
    "PreciseBN, skip_below": functools.partial(lbn.PreciseBNCallback, 20, skip_below=0.0),
    "FreezeBN": functools.partial(lbn.FreezeBNCallback, start_epoch=1, precise=lbn.PassConfig(20)),
}
EVALUATING: dict[str, Callable[..., Any]] = {
    "MiniBatchInference": functools.partial(lbn.MiniBatchInferenceCallback, stages=["validate", "test"]),
    "AdaBN": functools.partial(lbn.AdaBNCallback, num_samples=8, log_unadapted=True),
    "AdaBN, online": functools.partial(lbn.AdaBNCallback, online=True, prior_samples=4),
}
"""Those that act while the model is evaluated."""

CALLBACKS: dict[str, Callable[..., Any]] = {
    **WITH_A_PASS,
    **EVALUATING,
    "ForecastBN": functools.partial(lbn.ForecastBNCallback),
    "BNStatsMonitor": functools.partial(lbn.BNStatsMonitor, every_n_batches=1, window=2),
    "BatchLeakageMonitor": functools.partial(lbn.BatchLeakageMonitor, 24, log_errors=True),
    "GhostBN": functools.partial(lbn.GhostBNCallback, size=3),
    "SyncBN": functools.partial(lbn.SyncBNCallback),
    "DomainSpecificBN": functools.partial(lbn.DomainSpecificBNCallback, num_domains=3, domain_fn=labels),
    "RoIShuffle": functools.partial(lbn.RoIShuffleCallback, modules="bn*"),
}
"""Every callback, with arguments that make it act within two epochs of four batches of eight."""


every_callback = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
every_pass = pytest.mark.parametrize("make", WITH_A_PASS.values(), ids=WITH_A_PASS)


def patterns_of(make: Any) -> str:
    return "modules" if "modules" in inspect.signature(make.func).parameters else "layers"


class TinyNet(LightningModule):
    """A classifier of 3 x 6 x 6 images with BatchNorm layers ``bn1`` and ``bn2``, and all that a pass may disturb."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(0)  # every TinyNet starts from the same weights
            self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 6, 3)
            self.bn2 = nn.BatchNorm2d(6)
            self.drop = nn.Dropout(dropout)
            self.head = nn.Linear(6, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.average_loss = MeanMetric()
        self.register_buffer("queue", torch.zeros(8, 6))
        self.queue_end, self.losses, self.seen = 0, list[Tensor](), {"batches": 0}

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.drop(F.relu(self.bn2(self.conv2(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        features = self.features(x)
        logits = self.head(features)
        loss = F.cross_entropy(logits, y)
        self.remember(features.detach(), loss.detach())
        self.accuracy(logits.detach(), y)
        self.average_loss(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        metrics = {"train_accuracy": self.accuracy, "train_average_loss": self.average_loss}
        self.log_dict(metrics, on_epoch=True, batch_size=len(x))
        return loss

    def remember(self, features: Tensor, loss: Tensor) -> None:
        """Change state in all places where modules keep state: a queue buffer (as MoCo's), a list and a counter."""
        rows = [(self.queue_end + i) % len(self.queue) for i in range(min(len(features), len(self.queue)))]
        self.queue[rows] = features[: len(rows)].to(self.queue.dtype)
        self.queue_end = (rows[-1] + 1) % len(self.queue)
        self.losses.append(loss)
        self.seen["batches"] += 1

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        logits = self(x).float()
        self.log("val_loss", F.cross_entropy(logits, y), batch_size=len(x))
        self.log("val_sum", logits.square().sum(), batch_size=len(x), reduce_fx="sum")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Wider(TinyNet):
    """Has one BatchNorm layer more; an optimizer's state does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.BatchNorm2d(6)

    def features(self, x: Tensor) -> Tensor:
        return self.extra(self.bn2(self.conv2(self.bn1(self.conv1(x))))).mean((2, 3))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] = []


class MomentumEncoder(TinyNet):
    """With a teacher whose parameters the training step moves by ``update`` to a student's, as MoCo and BYOL do."""

    def __init__(self, update: Callable[[nn.Parameter, Tensor], Any], student_first: bool = False) -> None:
        super().__init__()
        self.update, self.student_first = update, student_first
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student, self.teacher = (
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)) for _ in "12"
            )
        self.teacher.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        answer = self.student(batch[0]) if self.student_first else None
        with torch.no_grad():
            for theirs, own in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                self.update(own, theirs)
            target = self.teacher(batch[0])
        answer = self.student(batch[0]) if answer is None else answer
        return super().training_step(batch, batch_idx) + F.mse_loss(answer, target)


def lerp_data(own: nn.Parameter, theirs: Tensor) -> None:
    own.data.lerp_(theirs.data, 0.1)


def other_data(own: nn.Parameter, theirs: Tensor) -> None:
    own.data = own.data.lerp(theirs.data, 0.1)


class Images(Dataset[tuple[Tensor, int]]):
    """Random images whose mean depends on their class, augmented on reading."""

    def __init__(self, size: int, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        own = torch.Generator().manual_seed(size)
        self.labels = torch.randint(CLASSES, (size,), generator=own)
        self.images = torch.randn(size, 3, 6, 6, generator=own) + self.labels.view(-1, 1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (self.augment(image) if self.augment else image), int(self.labels[index])


def torch_noise(image: Tensor) -> Tensor:
    return image + 0.1 * torch.randn_like(image)


def train_loader(size: int = 32, batch_size: int = 8, augment: Any = None, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Images(size, augment), batch_size=batch_size, **kwargs)


def first_batches(number: int, **kwargs: Any) -> list[Any]:
    return list(train_loader(**kwargs))[:number]


class Stream(IterableDataset[Any]):
    """The images of the default loader, of unknown number."""

    def __iter__(self) -> Iterator[Any]:
        return iter([Images(32)[i] for i in range(32)])


def equal_batches(times: int = 4) -> DataLoader[Any]:
    """An epoch of equal batches: it does not matter which of them Lightning shows again in a resumed epoch."""
    return DataLoader(ConcatDataset([Images(8)] * times), 8)


def val_loader(size: int = 12, batch_size: int = 6, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Images(size), batch_size=batch_size, **kwargs)


class TinyData(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader(shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return val_loader()

    test_dataloader = predict_dataloader = val_dataloader


class InMemory(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def logged(self, key: str) -> dict[int, float]:
        return {step: row[key] for step, row in self.rows if key in row}


@contextlib.contextmanager
def caught(about: str = "") -> Iterator[list[str]]:
    """The warnings that hold ``about``, each as often as it is given; complete at the end of the block."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield found
    found += [str(w.message) for w in record if about in str(w.message)]


def in_a_pass(module: LightningModule) -> bool:
    """Whether a pass runs now, in which the Trainer's loggers are muted."""
    return not any(isinstance(logger, InMemory) for logger in module.trainer.loggers)


def trainer_with(callbacks: Callback | Sequence[Callback] = (), **kwargs: Any) -> Trainer:
    """A plain Trainer: two epochs on the CPU, no output but an `InMemory` logger, no sanity check."""
    callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    quiet["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": InMemory(), "log_every_n_steps": 1}
    defaults |= {"num_sanity_val_steps": 0, **quiet}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(callbacks=callbacks, **{**defaults, **kwargs})


def fit(module: Any, callbacks: Any = (), train: Any = None, val: Any = "default", **kwargs: Any) -> Trainer:
    """Train from a fixed seed on four batches of eight images, and return the Trainer, which gets ``kwargs``."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = trainer_with(callbacks, **kwargs)
    seed_everything(7, verbose=False)
    train = train_loader() if train is None else train
    val = None if isinstance(train, LightningDataModule) else val_loader() if isinstance(val, str) else val
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer


def raising(error: Any) -> Any:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def said(about: str, *args: Any, **kwargs: Any) -> list[str]:
    """The warnings of a fit that hold ``about``."""
    with caught(about) as found:
        fit(*args, **kwargs)
    return found


class At(Callback):
    """Calls ``do`` with the Trainer, the module and what else a hook is given, at each of ``hooks``."""

    def __init__(self, do: Callable[..., Any], *hooks: str) -> None:
        for hook in hooks:
            setattr(self, hook, do)


class Recorder(Callback):
    """Records, as ``trace``, everything that an observing callback must not change; compare two runs with ``==``."""

    def __init__(self) -> None:
        self.trace: list[tuple[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.trace.append(("batch", (batch_idx, digest(batch))))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        gradients = digest([p.grad for p in pl_module.parameters()])
        self.trace.append(("loss and gradients", [outputs["loss"].item(), gradients]))
        self.trace.append(("random numbers", digest(random_states())))
        self.trace.append(("logged", logged_in_training(trainer)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        modes = {name: m.training for name, m in pl_module.named_modules()}
        self.trace.append(("module", [state_but_statistics(pl_module), modes, logged_in_training(trainer)]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trace.append(("optimizer", digest([o.state_dict() for o in trainer.optimizers])))


def digest(value: Any) -> Any:
    """A value to compare bit by bit with ``==``: every tensor and array in ``value`` becomes a hash of its bytes."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else value.numpy()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: digest(v) for key, v in value.items()}
    return [digest(v) for v in value] if isinstance(value, (list, tuple)) else value


def random_states() -> Iterable[Any]:
    return [random.getstate(), list(np.random.get_state()), torch.get_rng_state()]


def logged_in_training(trainer: Trainer) -> dict[str, float]:
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("train")}


def state_but_statistics(module: nn.Module) -> dict[str, Any]:
    """Parameters, buffers, metric states and plain attributes of a module; running statistics left out."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        own = {**m._parameters, **m._buffers, **{k: v for k, v in vars(m).items() if isinstance(v, _PLAIN)}}
        found.update({f"{name}.{key}": digest(v) for key, v in own.items() if key not in _NOT_COMPARED})
    return found


_PLAIN = (int, float, str, list, Tensor)
_STATISTICS = ("running_mean", "running_var")
_NOT_COMPARED = (*_STATISTICS, "_current_fx_name")
"""The latter is the name of the hook that Lightning calls at the moment."""


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if k.rpartition(".")[2] in _STATISTICS}


def exact_statistics(
    module: TinyNet, batches: Iterable[Any], together: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """Oracle: mean and biased variance over all inputs of each BatchNorm layer, in float64, by keeping the inputs.

    Layers normalize all batches ``together``, in one tensor, or each by its own statistics.
    """
    twin = TinyNet().double()
    twin.load_state_dict(module.state_dict())
    inputs: dict[str, list[Tensor]] = {"bn1": [], "bn2": []}
    for name, kept in inputs.items():
        layer = twin.get_submodule(name).train()
        layer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].detach()))
    twin.drop.eval()
    images = [x.double() for x, _ in batches]
    for x in [torch.cat(images)] if together else images:
        twin(x)
    rows = {name: torch.cat([x.movedim(1, -1).flatten(0, -2) for x in kept]) for name, kept in inputs.items()}
    return {name: (r.mean(0), r.var(0, correction=0)) for name, r in rows.items()}


def expected(module: TinyNet, batches: Iterable[Any], together: bool = True) -> dict[str, Any]:
    """Running statistics that ``module`` should have after a pass over ``batches``, by the names of its buffers."""
    pairs = exact_statistics(module, batches, together).items()
    return {f"{name}.{kind}": s.float() for name, pair in pairs for kind, s in zip(_STATISTICS, pair, strict=True)}


MOMENTS = {
    "on_sanity_check_end": "sanity check",
    "on_train_batch_start": "training",
    "on_validation_batch_start": "validation",
    "on_validation_batch_end": "too late in the validation",
    "on_test_batch_start": "test",
    "on_predict_batch_start": "predict",
    "on_train_epoch_end": "epoch end",
}


class Passes(Callback):
    """Records the moment and optimizer step of each pass; place it after the callback."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.last, self.seen = callback, None, []
        for hook, moment in MOMENTS.items():
            setattr(self, hook, functools.partial(self.look, moment))

    def look(self, moment: str, trainer: Trainer, *_: Any) -> None:
        if self.callback.result is not self.last:
            self.last = self.callback.result
            self.seen.append((moment, trainer.global_step))


class Evaluated(Callback):
    """Keeps the module's state dict and the metrics of each validation in a fit."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val")})


def loaded(state: dict[str, Tensor]) -> TinyNet:
    module = TinyNet()
    module.load_state_dict(state, strict=True)
    return module.eval()


def validation_loss(module: TinyNet) -> float:
    (x, y) = next(iter(val_loader(batch_size=12)))
    with torch.no_grad():
        return F.cross_entropy(module.eval()(x), y).item()
