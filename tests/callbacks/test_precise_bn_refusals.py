"""What PreciseBN and FreezeBN refuse before training begins, and what they name once; the lines to copy work."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_bn
from lightning_bn import FreezeBNCallback, PreciseBNCallback
from tests.callbacks.zoo import TinyNet, fit, train_loader

PASSES: dict[str, Callable[..., Any]] = {
    "PreciseBNCallback": lambda **kwargs: PreciseBNCallback(**{"num_samples": 20, **kwargs}),
    "FreezeBNCallback": lambda **kwargs: FreezeBNCallback(**{"start_epoch": 1, "num_samples": 20, **kwargs}),
}
every_pass = pytest.mark.parametrize("name", PASSES)


class Counts(TinyNet):
    """Counts its training steps."""

    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).steps += not any(type(logger).__name__ == "_Muted" for logger in self.trainer.loggers)
        if isinstance(batch, dict):
            batch = batch["x"], batch["y"]
        return super().training_step(batch, batch_idx)


class TakesBoth(Counts):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def dicts(items: list[Any]) -> dict[str, Tensor]:
    return dict(zip("xy", torch.utils.data.default_collate(items), strict=True))


def copied_from(message: str, name: str) -> Any:
    """The callback that a message's line to copy makes."""
    start = message.index(f"such as {name}(") + len(f"such as {name}")
    depth = list(itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in message[start:]))
    arguments = message[start : start + depth.index(0) + 1]
    return PASSES[name](**eval(f"dict{arguments}", {}))


@every_pass
@pytest.mark.parametrize(
    ("module", "collate", "misfit"),
    [
        (Counts, dicts, r"keys as arguments \(x, y\), which does not fit: got an unexpected keyword argument 'y'"),
        (TakesBoth, None, "the first element of the batch, which does not fit: missing a required argument: 'y'"),
    ],
    ids=["dict", "tuple"],
)
def test_a_batch_that_forward_cannot_be_called_on_is_refused_before_any_step(
    name: str, module: type[Counts], collate: Any, misfit: str
) -> None:
    module.steps = 0
    with pytest.raises(ValueError, match=rf"^{name}: forward='forward' calls .*{misfit}") as refused:
        fit(module(), PASSES[name](forward="forward"), train_loader(collate_fn=collate), val=None)
    assert module.steps == 0
    fit(module(), copied_from(str(refused.value), name), train_loader(collate_fn=collate), val=None)


@every_pass
def test_a_source_of_its_own_may_have_batches_of_another_kind(name: str) -> None:
    own = PASSES[name](forward="forward", source=lambda _: [(x,) for x, _ in train_loader()])
    fit(Counts(), own, train_loader(collate_fn=dicts), val=None)


class WithoutForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def images() -> DataLoader[Any]:
    return DataLoader([x for x, _ in train_loader().dataset], 8)


@every_pass
def test_a_module_without_forward_is_refused_and_the_line_to_copy_works(name: str) -> None:
    with pytest.raises(ValueError, match="WithoutForward defines no forward") as refused:
        fit(WithoutForward(), PASSES[name](forward="forward"), images(), val=None)
    fit(WithoutForward(), copied_from(str(refused.value), name), images(), val=None)


@every_pass
def test_a_forward_function_of_other_arguments_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: forward must be a function of module and batch.*too many"):
        fit(TinyNet(), PASSES[name](forward=lambda batch: batch))


class Gan(LightningModule):
    """Optimizes two networks by hand; its forward runs the generator alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))
        self.discriminator = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.generator(torch.randn(len(x), 2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (-1, 1), strict=True):
            optimizer.zero_grad()
            self.manual_backward(sign * (self.discriminator(self(batch)).mean() - self.discriminator(batch).mean()))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), 0.01) for net in (self.generator, self.discriminator)]


def vectors() -> DataLoader[Any]:
    return DataLoader(torch.randn(32, 5), 8)


def told(fit: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    return [str(w.message) for w in caught if "BNCallback" in str(w.message)]


@every_pass
def test_a_gan_is_refused_with_a_line_to_copy_and_runs_by_it_and_by_forward(name: str) -> None:
    with pytest.raises(ValueError, match=r"Gan optimizes manually.*forward='forward'") as refused:
        fit(Gan(), PASSES[name](), vectors(), val=None)
    by_line, by_forward = copied_from(str(refused.value), name), PASSES[name](forward="forward")
    assert not told(lambda: fit(Gan(), by_line, vectors(), val=None))
    (named,) = told(lambda: fit(Gan(), by_forward, vectors(), val=None))
    assert f"{name}: the batches of a pass do not reach layer 'discriminator.1' (1 in all)" in named
    assert not told(lambda: fit(Gan(), copied_from(named, name), vectors(), val=None))
    assert not told(lambda: fit(Gan(), PASSES[name](forward="forward", layers="generator*"), vectors(), val=None))


class Teacher(TinyNet):
    """An average of the network that no forward of training calls; and a layer that nothing ever calls."""

    def __init__(self, averages: bool) -> None:
        super().__init__()
        self.averages = averages
        self.teacher = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten()).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.averages:
            for mean, own in zip(self.teacher[0].parameters(), self.bn1.parameters(), strict=True):
                mean.data.lerp_(own.data, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [("PreciseBNCallback", {}, 1), ("FreezeBNCallback", {}, 1), ("FreezeBNCallback", {"statistics": "ema"}, 0)],
    ids=["PreciseBN", "FreezeBN", "FreezeBN, ema"],
)
def test_a_layer_that_no_pass_reaches_is_named_once_if_training_changes_it_and_never_else(
    name: str, options: dict[str, str], named: int
) -> None:
    said = told(lambda: fit(Teacher(averages=True), PASSES[name](**options), max_epochs=3))
    assert ["do not reach layer 'teacher.0'" in s for s in said] == [True] * named
    assert not told(lambda: fit(Teacher(averages=False), PASSES[name](**options), max_epochs=3))


@pytest.mark.parametrize("statistics", ["precise", "ema"])
def test_layers_that_training_reaches_and_has_never_trained_are_named_at_the_switch(statistics: Any) -> None:
    never = PASSES["FreezeBNCallback"](start_epoch=0, statistics=statistics)
    (said,) = [s for s in told(lambda: fit(Teacher(averages=False), never)) if "never trained" in s]
    named = "3 layers" if statistics == "ema" else "2 layers"  # before the first step nobody knows what is called
    assert f"{named}, 'bn1' first" in said


class Twice(PreciseBNCallback):
    """A class of the user's."""


@pytest.mark.parametrize("cls", [PreciseBNCallback, Twice, FreezeBNCallback, lightning_bn.BNStatsMonitor], ids=str)
def test_one_class_twice_is_refused_in_our_words(cls: Any) -> None:
    options = {"start_epoch": 1} if cls is FreezeBNCallback else {}
    with pytest.raises(ValueError, match=rf"Two {cls.__name__}s act on layer 'bn1' \(2 in all\): .*layers="):
        fit(TinyNet(), [cls(**options), cls(**options)])


@pytest.mark.parametrize(("last", "epochs"), [(20, 2), (3, 2)])
def test_more_last_epochs_than_there_are_is_refused_with_both_numbers(last: int, epochs: int) -> None:
    refused = rf"FreezeBNCallback\(last_n_epochs={last}\) is more than the Trainer's max_epochs={epochs}.*start_epoch=0"
    with pytest.raises(ValueError, match=refused):
        fit(TinyNet(), FreezeBNCallback(last_n_epochs=last), max_epochs=epochs)
    fit(TinyNet(), FreezeBNCallback(last_n_epochs=last), fast_dev_run=True)  # which has one epoch of its own


@every_pass
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"num_samples": None}, TypeError),
        ({"num_samples": 2.5}, TypeError),
        ({"layers": 3}, TypeError),
        ({"batch_size_fn": 3}, TypeError),
        ({"on_error": "ignore"}, ValueError),
        ({"source": 3}, ValueError),
        ({"forward": None}, ValueError),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_at_construction_by_its_name(
    name: str, wrong: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^{next(iter(wrong))} must be"):
        PASSES[name](**wrong)


@pytest.mark.parametrize("value", ["no", "false", 0, 1, None])
@pytest.mark.parametrize(
    ("cls", "argument"),
    [(PreciseBNCallback, "when_needed"), (PreciseBNCallback, "shard"), (FreezeBNCallback, "affine")],
    ids=str,
)
def test_what_is_no_truth_value_is_refused_by_the_arguments_name(cls: Any, argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be True or False but is {value!r}"):
        cls(**{argument: value}, **({"start_epoch": 1} if cls is FreezeBNCallback else {}))


def test_layers_are_checked_at_construction_without_a_pass_too() -> None:
    with pytest.raises(TypeError, match="layers must be a glob pattern"):
        PreciseBNCallback(source="training", layers=3)  # type: ignore[arg-type]


class Grows(TinyNet):
    """Its batches come to be something else, in the middle of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["of"] if isinstance(batch, dict) else batch, batch_idx)


def test_a_later_batch_that_cannot_be_kept_for_a_replay_is_left_out_with_one_warning() -> None:
    def count(batch: Any) -> int:
        if isinstance(batch, dict):
            raise ValueError("what is this")
        return len(batch[0])

    whole = list(train_loader())
    batches = DataLoader([whole[0], {"of": whole[1]}, {"of": whole[2]}, whole[3]], batch_size=None)
    precise = PreciseBNCallback(32, source="replay", batch_size_fn=count)
    (said,) = told(lambda: fit(Grows(), precise, batches))
    assert "could not keep a batch for the replay" in said and "what is this" in said
    assert precise.result.num_samples == 32
    with pytest.raises(ValueError, match=r"^PreciseBNCallback: what is this"):
        fit(
            Grows(),
            PreciseBNCallback(32, source="replay", batch_size_fn=count),
            DataLoader([{"of": whole[0]}], batch_size=None),
        )
