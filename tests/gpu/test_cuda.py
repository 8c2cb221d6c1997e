"""The branches that only run on a GPU; docs/how-it-is-built.md lists them. `make gpu` runs these tests."""

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_bn as lbn
from lightning_bn.core.batch_copy import HostCopy
from lightning_bn.lockstep.offload import OffloadedStorages, free_memory
from tests.truth import assert_close_to, in_double
from tests.zoo import cnn, images

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_device(*sizes: int, mean: float = 0.0) -> tuple[nn.Module, list[Tensor]]:
    """A small network and batches."""
    return cnn().to(DEVICE), [x.to(DEVICE) for x in images(*sizes, mean=mean)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_a_pass_has_the_float64_statistics_of_all_batches(layout: torch.memory_format, mean: float) -> None:
    model, batches = on_device(5, 4, 7, mean=mean)
    model, batches = model.to(memory_format=layout), [x.contiguous(memory_format=layout) for x in batches]
    truth = in_double(model, batches)
    statistics = lbn.precise_bn(model, batches, normalization_batch_size="loader")
    assert_close_to(statistics, truth, 1e-4, 1e-3)
    assert all(s.mean.device.type == DEVICE for s in statistics.values())


@pytest.mark.parametrize("kwargs", [{}, {"memory_limit": 1}], ids=["in memory", "offloaded"])
def test_joint_batches_are_one_batch(kwargs: dict[str, Any]) -> None:
    model, batches = on_device(5, 4, 7)
    truth = in_double(model, [torch.cat(batches)])
    statistics = lbn.precise_bn(model, batches, normalization_batch_size="population", **kwargs)
    assert_close_to(statistics, truth, 1e-5, 1e-4)
    assert (statistics.spilled > 0) == bool(kwargs)


def test_a_pass_under_autocast_measures_what_the_layers_get() -> None:
    def forward(model: nn.Module, x: Tensor) -> None:
        with torch.autocast(DEVICE, torch.float16):
            model(x)

    model, batches = on_device(32, 32)
    found = lbn.precise_bn(model, batches, forward=forward, normalization_batch_size="loader")
    assert_close_to(found, in_double(model, batches), 5e-3, 2e-2)


@pytest.mark.parametrize(
    ("kwargs", "at_most"),
    [({"normalization_batch_size": "loader"}, 2), ({"normalization_batch_size": 8}, 5)],
    ids=["as they come", "joint"],
)
def test_a_pass_hardly_ever_waits(kwargs: dict[str, Any], at_most: int) -> None:
    model, batches = on_device(4, 4, 4, 4)
    lbn.precise_bn(model, batches, **kwargs)  # loads kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lbn.precise_bn(model, batches, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= at_most, [f"{w.filename}:{w.lineno}" for w in waits]


def test_suspended_forwards_keep_their_stream_and_their_random_numbers() -> None:
    class OnItsStream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stream, self.bn, self.seen = torch.cuda.Stream(), nn.BatchNorm1d(4), list[bool]()

        def forward(self, x: Tensor) -> Tensor:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                y = self.bn(torch.dropout(x, 0.5, True))
                self.seen.append(torch.cuda.current_stream() == self.stream)
            torch.cuda.current_stream().wait_stream(self.stream)
            return y

    model = OnItsStream().to(DEVICE)
    before, outside = torch.cuda.get_rng_state(), torch.cuda.current_stream()
    lbn.precise_bn(model, torch.randn(3, 8, 4, device=DEVICE), normalization_batch_size="population")
    assert all(model.seen) and torch.cuda.current_stream() == outside
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_storages_move_to_the_host_and_back() -> None:
    x = torch.randn(1000, device=DEVICE)
    expected = x.cpu()
    offloaded = OffloadedStorages([x.untyped_storage()])
    assert x.untyped_storage().nbytes() == 0
    offloaded.restore()
    assert torch.equal(x.cpu(), expected)
    assert 0 < free_memory(torch.device(DEVICE)) <= torch.cuda.get_device_properties(0).total_memory


def test_a_kept_batch_returns_to_its_device() -> None:
    batch = {"x": torch.randn(3, device=DEVICE), "y": torch.zeros(2)}
    copied = HostCopy(batch).batch()
    assert copied["x"].device.type == DEVICE and copied["y"].device.type == "cpu"
    assert torch.equal(copied["x"], batch["x"])


@pytest.mark.parametrize("grouping", ["interleaved", "contiguous"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [16, 15])
def test_ghosts_are_those_of_the_cpu(grouping: Any, layout: torch.memory_format, samples: int) -> None:
    layer, x = nn.BatchNorm2d(3), torch.randn(samples, 3, 4, 4)

    def step(device: str) -> list[Tensor]:
        bn, given = copy.deepcopy(layer).to(device), x.to(device, memory_format=layout).requires_grad_()
        with lbn.ghost_bn(bn, size=4, grouping=grouping):
            output = bn(given)
        output.square().mul(torch.arange(output[0].numel(), device=device).view_as(output[0])).sum().backward()
        gradients = [t.grad for t in (given, *bn.parameters())]
        return [t.detach().cpu() for t in (output, *gradients, *bn.buffers()) if t is not None]

    for found, expected in zip(step(DEVICE), step("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Classifier(LightningModule):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(cnn(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.network(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(callbacks: list[Callback], precision: Any = "32-true") -> tuple[dict[str, Tensor], list[Any]]:
    """State dict and random states at the end of a fit of two epochs."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    loader = DataLoader(torch.randn(32, 3, 8, 8), batch_size=8)
    module = Classifier()
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=2,
        precision=precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    return module.cpu().state_dict(), [torch.get_rng_state(), torch.cuda.get_rng_state()]


MAKE: dict[str, Callable[[], Callback]] = {
    "precise": lambda: lbn.PreciseBNCallback(32, normalization_batch_size="loader"),
    "joint": lambda: lbn.PreciseBNCallback(32, normalization_batch_size=32),
    "replay": lambda: lbn.PreciseBNCallback(32, source="replay"),
    "forecast": lambda: lbn.ForecastBNCallback(),
    "leakage": lambda: lbn.BatchLeakageMonitor(num_samples=32),
}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", MAKE)
def test_weights_and_random_numbers_of_a_fit_are_those_without(name: str, precision: str) -> None:
    plain, plain_random = fit([], precision)
    found, found_random = fit([MAKE[name]()], precision)
    for key, value in plain.items():
        if "running" not in key:
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)  # cuDNN may choose other kernels
    assert all(torch.equal(a, b) for a, b in zip(found_random, plain_random, strict=True))
