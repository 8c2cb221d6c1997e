"""`normalization_batch_size`: the number of samples behind a layer's batch statistics, in and outside a Trainer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from lightning_bn import (
    BNStatsMonitor,
    DomainSpecificBNCallback,
    FreezeBNCallback,
    GhostBNCallback,
    SyncBNCallback,
    freeze_bn,
    ghost_bn,
    normalization_batch_size,
    sync_bn,
)
from tests.callbacks.zoo import TinyNet, fit, train_loader
from tests.ranks import run_on_ranks


class Sizes(Callback):
    """The sizes at every training batch and validation batch."""

    def __init__(self) -> None:
        self.training: list[dict[str, float]] = []
        self.validating: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.training.append(normalization_batch_size(pl_module, samples=len(batch[0])))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.validating.append(normalization_batch_size(pl_module, samples=8))


def seen(callbacks: list[Any], train: Any = None, module: Any = None, **kwargs: Any) -> Sizes:
    sizes = Sizes()
    fit(module or TinyNet(), [*callbacks, sizes], train, **{"max_epochs": 1, **kwargs})
    return sizes


def warnings_of(callbacks: list[Any], train: Any = None, **kwargs: Any) -> str:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        seen(callbacks, train, **kwargs)
    return " ".join(str(w.message) for w in record)


def both(size: float) -> dict[str, float]:
    return {"bn1": size, "bn2": size}


@pytest.mark.parametrize(
    ("callbacks", "size"),
    [
        ([], 8),
        ([GhostBNCallback(size=100)], 8),
        ([GhostBNCallback(size=4)], 4),
        ([GhostBNCallback(size=5)], 4),
        ([GhostBNCallback(splits=3)], 3),
        ([GhostBNCallback(splits=100)], 1),
        ([SyncBNCallback()], 8),
    ],
)
def test_it_is_that_of_the_largest_group_also_with_accumulation(callbacks: list[Any], size: int) -> None:
    sizes = seen(callbacks, accumulate_grad_batches=4)
    assert sizes.training == [both(size)] * 4
    assert sizes.validating == [both(size)] * 2, "in evaluation it is still that of training"


@pytest.mark.parametrize(
    ("options", "samples"),
    [({"size": 3}, 33), ({"size": 3}, 2), ({"splits": 3}, 7), ({"size": 1}, 8), ({"splits": 5}, 8)],
)
def test_it_is_the_largest_number_of_samples_that_one_sample_changes(options: Any, samples: int) -> None:
    module, x = TinyNet(), torch.randn(samples, 4, 2, 2)
    with ghost_bn(module, grouping="contiguous", **options):
        expected = normalization_batch_size(module, samples=samples)
        before, sizes = module.bn1(x), []
        for sample in range(samples):
            other = x.clone()
            other[sample] += 1
            sizes.append(int((module.bn1(other) != before).flatten(1).any(1).sum()))
    assert expected["bn1"] == max(sizes)


def labels(batch: Any) -> Tensor:
    return batch[1]


def test_domains_of_samples_are_as_large_as_the_largest() -> None:
    """One domain per class; with one domain per batch it is the whole batch."""
    largest = [both(int(y.bincount().max())) for _, y in train_loader()]
    apart, together = (
        DomainSpecificBNCallback(3, domain_fn=labels, train_statistics=s, population_statistics=s)
        for s in ("domain", "shared")
    )
    assert seen([apart], train_loader()).training == largest and max(v["bn1"] for v in largest) < 8
    assert seen([together], train_loader()).training == [both(8)] * 4
    assert seen([DomainSpecificBNCallback(3, domain_fn=len)], train_loader(16, 8)).training == [both(8)] * 2


def test_only_chosen_layers() -> None:
    assert seen([GhostBNCallback(size=2, layers="bn2")]).training[0] == {"bn1": 8, "bn2": 2}
    assert normalization_batch_size(TinyNet(), samples=3, layers="*2") == {"bn2": 3}


def test_it_is_nan_for_frozen_layers_and_layers_in_eval_mode() -> None:
    module = TinyNet()
    module.bn2.eval()
    look = seen(
        [FreezeBNCallback(start_step=2, statistics="ema", layers="bn1"), GhostBNCallback(size=4)], module=module
    )
    assert [row["bn1"] for row in look.training[:2]] == [4, 4]
    assert all(math.isnan(row["bn1"]) for row in look.training[3:])
    assert all(math.isnan(row["bn2"]) for row in look.training)


def test_layers_frozen_by_base_finetuning_in_train_mode_normalize_with_the_batch() -> None:
    module = TinyNet()
    BaseFinetuning.freeze_module(module.bn1)
    x = torch.randn(8, 4, 3, 3)
    assert not torch.allclose(module.bn1(x)[0], module.bn1(x[:4])[0])
    assert normalization_batch_size(module, samples=8) == both(8)


def test_a_plain_model_needs_no_trainer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    with freeze_bn(model, layers="1"), ghost_bn(model, splits=2, layers="3"):
        for mode in (True, False):
            sizes = normalization_batch_size(model.train(mode), samples=6)
            assert math.isnan(sizes["1"]) and sizes["3"] == 3
    assert normalization_batch_size(model.eval(), samples=6) == {"1": 6, "3": 6}
    model.train()[1].eval()
    assert math.isnan(normalization_batch_size(model, samples=6)["1"])


@pytest.mark.parametrize(("samples", "error"), [(0, ValueError), (2.5, TypeError), (None, TypeError)])
def test_samples_must_be_a_positive_number(samples: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="samples must be"):
        normalization_batch_size(TinyNet(), samples=samples)


def test_freezing_warns_from_16_samples_on_but_not_with_ghost_batches_of_8() -> None:
    freeze = FreezeBNCallback(start_step=1, statistics="ema")
    assert "holds 32 samples" in warnings_of([freeze], train_loader(64, 32))
    assert "normalization batch" not in warnings_of([GhostBNCallback(size=8), freeze], train_loader(64, 32))


# ------------------------------------------------------------------------------------------------------ several ranks
def on_rank(callbacks: list[Any]) -> list[dict[str, float]]:
    return seen(callbacks, devices=2, strategy="ddp").training


def by_hand() -> dict[str, Any]:
    """Sizes with torch's SyncBatchNorm, which does not run on the CPU, and with groups of ranks."""
    torchs, ours = nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet()), TinyNet()
    of_one = torch.distributed.new_subgroups(1)[0]
    small = nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet(), of_one)
    with sync_bn(ours, group_size=2, layers="bn1"):
        return {
            "torch": normalization_batch_size(torchs, samples=8),
            "torch, group": normalization_batch_size(small, samples=8),
            "ours": normalization_batch_size(ours, samples=8),
        }


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("callbacks", "size"),
    [([], 8), ([SyncBNCallback()], 16), ([GhostBNCallback(size=2)], 2)],
    ids=["", "sync", "ghost"],
)
def test_ranks_change_it_only_if_they_share_statistics(callbacks: list[Any], size: int) -> None:
    assert run_on_ranks(on_rank, 2, callbacks) == [[both(size)] * 2] * 2


@pytest.mark.ddp
def test_it_counts_the_ranks_of_a_layers_own_group() -> None:
    for sizes in run_on_ranks(by_hand, 4):
        assert sizes == {"torch": both(32), "torch, group": both(8), "ours": {"bn1": 16, "bn2": 8}}


def synced_and_frozen() -> str:
    callbacks = [SyncBNCallback(), FreezeBNCallback(start_step=1, statistics="ema"), BNStatsMonitor(1, window=2)]
    return warnings_of(callbacks, devices=2, strategy="ddp")


@pytest.mark.ddp
def test_freezing_warns_of_synchronized_ranks() -> None:
    first, _ = run_on_ranks(synced_and_frozen, 2)
    assert "normalization batch holds 16 samples" in first
