"""Layers that people write themselves, in a fit: the statistics of every pass."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import FreezeBNCallback, FromLoader, PassConfig, PreciseBNCallback
from tests.callbacks.zoo import fit
from tests.hand_written import ZOO, Net, batches, state, truth

SAMPLES = 12
KINDS = ["transposed", "masked, arguments by name", "container", "by hand, by assignment", "own statistics, in place"]
KINDS += ["counts itself", "two halves", "DAWNBench's ghost", "timm BatchNormAct2d", "timm SplitBatchNorm2d", "a child"]
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
