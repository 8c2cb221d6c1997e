"""Layers that people write themselves, in a fit: the statistics of every pass, the monitor and the forecast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BNStatsMonitor, ForecastBNCallback, FreezeBNCallback, FromLoader, PassConfig, PreciseBNCallback
from tests.callbacks.zoo import caught, fit
from tests.hand_written import ZOO, Net, batches, state, truth

SAMPLES = 12
KINDS = (
    "transposed",
    "masked, arguments by name",
    "container",
    "by hand, by assignment",
    "own statistics, in place",
    "counts itself",
    "two halves",
    "DAWNBench's ghost",
    "timm BatchNormAct2d",
    "timm SplitBatchNorm2d",
    "a child",
)
"""One of each; on the CPU SyncBatchNorm does not train."""
UNTOLD_KINDS = ("by hand, masked", "by hand, activated")


class Module(LightningModule):
    """Trains nothing, so that the weights at a pass are those at the end."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Net(ZOO[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@cache
def data() -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return batches([2] * (SAMPLES // 2))


def loader(_: Any = None) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.cat(data())), batch_size=2)


def shown(module: LightningModule, batch: Any) -> Tensor:
    return module(batch[0])


def freezing(**kwargs: Any) -> FreezeBNCallback:
    callback = FreezeBNCallback(start_step=6, precise=PassConfig(SAMPLES), **kwargs)
    callback.on_error = "raise"
    return callback


PASSES: dict[str, Callable[..., Callback]] = {
    "train dataloader, training step": partial(PreciseBNCallback, SAMPLES),
    "replay, forward": partial(PreciseBNCallback, SAMPLES, source="replay", forward="forward"),
    "loader, function": partial(PreciseBNCallback, SAMPLES, source=FromLoader(loader), forward=shown),
    "freeze": freezing,
}


def assert_close_to(rows: Tensor, mean: Tensor, var: Tensor) -> None:
    true_var, true_mean = torch.var_mean(rows, 0, correction=0)
    assert ((mean - true_mean).abs() <= 1e-5 * true_var.sqrt()).all()
    assert ((var - true_var).abs() <= 1e-5 * true_var).all()


def after_fit(name: str, callbacks: list[Callback]) -> Net:
    module = Module(name)
    fit(module, callbacks, loader(), val=None, max_epochs=2)
    return module.net


EVERY_KIND = [(name, list(PASSES.values())[way]) for i, name in enumerate(KINDS) for way in (0, 1 + i % 3)]
"""Every kind of layer in the first way to a layer, and every way with some kinds."""


@pytest.mark.parametrize(("name", "make"), EVERY_KIND)
def test_a_pass_of_a_fit_stores_what_batch_norm_normalizes(name: str, make: Callable[..., Callback]) -> None:
    callback = make()
    net = after_fit(name, [callback])
    for layer, rows in truth(net, [data()]).items():
        stored = net.get_submodule(layer)
        assert_close_to(rows, stored.running_mean, stored.running_var)
    if isinstance(callback, PreciseBNCallback):
        assert state(net) == state(after_fit(name, []))


@pytest.mark.parametrize("make", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("name", UNTOLD_KINDS)
def test_an_unknown_computation_is_refused_by_name_and_the_alternative_works(name: str, make: Any) -> None:
    with pytest.raises(TypeError, match=r"'net\.bn'.*layers="):
        after_fit(name, [make()])
    after_fit(name, [make(layers="net.last")])


class Fits(LightningModule):
    """Two calls a step of one net, the second at momentum 0; it does not learn."""

    def __init__(self, name: str, fails_at: int = -1) -> None:
        super().__init__()
        self.net, self.fails_at = Net(ZOO[name]), fails_at
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)
        self.net.last.momentum = 0.0
        self.net.last(3 + 9 * batch)
        self.net.last.momentum = 0.1
        if batch_idx == self.fails_at:
            raise KeyError("the step")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def fit_twice_a_step(module: LightningModule, callbacks: Any) -> list[str]:
    loader: DataLoader[Any] = DataLoader(batches([8]) * 12, batch_size=None)
    with caught() as said:
        fit(module, callbacks, loader, None, max_epochs=1)
    return said


@pytest.mark.parametrize("fails_at", [100, 0, 5])
@pytest.mark.parametrize("kind", [lambda: BNStatsMonitor(1, window=2), ForecastBNCallback])
def test_nothing_of_ours_is_left_in_the_layers_and_nothing_ends_the_fit(kind: Any, fails_at: int) -> None:
    module = Fits("own statistics, inverted momentum", fails_at)
    before = [type(m) for m in module.modules()]
    with caught("cannot measure a batch") as said, contextlib.suppress(KeyError):
        fit_twice_a_step(module, kind())
    assert [type(m) for m in module.modules()] == before
    assert not said
