"""PreciseBN and FreezeBN refuse or warn before training begins, and the code that their messages show works."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_bn
from lightning_bn import FreezeBNCallback, FromLoader, PassConfig, PreciseBNCallback
from tests.callbacks.zoo import TinyNet, fit, in_a_pass, said, train_loader


def freezing(start_epoch: int = 1, statistics: Any = "precise", layers: Any = None, **own: Any) -> FreezeBNCallback:
    precise = PassConfig(**{"num_samples": 20, **own})
    return FreezeBNCallback(start_epoch=start_epoch, statistics=statistics, layers=layers, precise=precise)


PASSES: dict[str, Callable[..., Any]] = {
    "PreciseBNCallback": functools.partial(PreciseBNCallback, num_samples=20),
    "FreezeBNCallback": freezing,
}
every_pass = pytest.mark.parametrize("name", PASSES)


class Counts(TinyNet):
    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).steps += not in_a_pass(self)
        if isinstance(batch, dict):
            batch = batch["x"], batch["y"]
        return super().training_step(batch, batch_idx)


class TakesBoth(Counts):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def dicts(items: list[Any]) -> dict[str, Tensor]:
    return dict(zip("xy", torch.utils.data.default_collate(items), strict=True))


def copied_from(message: str, name: str) -> Any:
    """The callback of the example code in a message."""
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
def test_a_batch_that_forward_does_not_take_is_refused_before_any_step(
    name: str, module: type[Counts], collate: Any, misfit: str
) -> None:
    module.steps = 0
    with pytest.raises(ValueError, match=rf"^{name}: forward='forward' calls .*{misfit}") as refused:
        fit(module(), PASSES[name](forward="forward"), train_loader(collate_fn=collate), val=None)
    assert module.steps == 0
    fit(module(), copied_from(str(refused.value), name), train_loader(collate_fn=collate), val=None)
    # a source of its own may have batches of another kind
    own = PASSES[name](forward="forward", source=FromLoader(lambda _: [(x,) for x, _ in train_loader()]))
    fit(Counts(), own, train_loader(collate_fn=dicts), val=None)


class WithoutForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@every_pass
def test_a_module_without_forward_is_refused_and_the_line_to_copy_works(name: str) -> None:
    images = DataLoader([x for x, _ in train_loader().dataset], 8)
    with pytest.raises(ValueError, match="WithoutForward defines no forward") as refused:
        fit(WithoutForward(), PASSES[name](forward="forward"), images, val=None)
    fit(WithoutForward(), copied_from(str(refused.value), name), images, val=None)
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


@every_pass
def test_a_gan_is_refused_with_example_code_that_works_and_runs_by_forward(name: str) -> None:
    with pytest.raises(ValueError, match=r"Gan optimizes manually.*forward='forward'") as refused:
        fit(Gan(), PASSES[name](), vectors(), val=None)
    by_line, by_forward = copied_from(str(refused.value), name), PASSES[name](forward="forward")
    assert not said("BNCallback", Gan(), by_line, vectors(), val=None)
    (named,) = said("BNCallback", Gan(), by_forward, vectors(), val=None)
    assert f"{name}: the batches of a pass do not reach layer 'discriminator.1' (1 in all)" in named
    for silent in (copied_from(named, name), PASSES[name](forward="forward", layers="generator*")):
        assert not said("BNCallback", Gan(), silent, vectors(), val=None)


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
)
def test_a_layer_that_no_pass_reaches_is_named_once_if_training_changes_it(name: str, options: Any, named: int) -> None:
    found = said("BNCallback", Teacher(averages=True), PASSES[name](**options), max_epochs=3)
    assert ["do not reach layer 'teacher.0'" in s for s in found] == [True] * named
    assert not said("BNCallback", Teacher(averages=False), PASSES[name](**options), max_epochs=3)


@pytest.mark.parametrize("statistics", ["precise", "ema"])
def test_layers_that_training_reaches_and_has_never_trained_are_named_at_the_switch(statistics: Any) -> None:
    never = PASSES["FreezeBNCallback"](start_epoch=0, statistics=statistics)
    (found,) = said("never trained", Teacher(averages=False), never)
    named = 3 if statistics == "ema" else 2  # before the first step nobody knows what is called
    assert f"{named} layers, 'bn1' first" in found


def test_more_last_epochs_than_there_are_is_refused_with_both_numbers() -> None:
    refused = r"FreezeBNCallback\(last_n_epochs=3\) is more than the Trainer's max_epochs=2.*start_epoch=0"
    with pytest.raises(ValueError, match=refused):
        fit(TinyNet(), FreezeBNCallback(last_n_epochs=3), max_epochs=2)
    fit(TinyNet(), FreezeBNCallback(last_n_epochs=3), fast_dev_run=True)  # which has one epoch of its own


@pytest.mark.parametrize(
    "make", [*PASSES.values(), lambda: lightning_bn.ForecastBNCallback()], ids=[*PASSES, "Forecast"]
)
def test_a_wrong_on_error_is_refused_at_fit_start(make: Any) -> None:
    callback = make()
    callback.on_error = "ignore"
    with pytest.raises(ValueError, match="on_error must be"):
        fit(TinyNet(), callback)
