"""The normalization batch size of a layer: of how many samples its statistics really are, whatever the Trainer does."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
from lightning_bn.layers import ghost
from lightning_bn.layers.override import BatchNormCall
from tests.callbacks.zoo import TinyNet, fit, train_loader, trainer_with, val_loader
from tests.ranks import run_on_ranks


class Look(Callback):
    """The sizes at every batch, in every validation, and when training ends."""

    def __init__(self) -> None:
        self.training: list[dict[str, float]] = []
        self.validating: list[dict[str, float]] = []
        self.at_the_end: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.training.append(normalization_batch_size(trainer, pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.validating.append(normalization_batch_size(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at_the_end = normalization_batch_size(trainer, pl_module)


def seen(callbacks: list[Any], train: Any = None, module: Any = None, **kwargs: Any) -> Look:
    look = Look()
    fit(module or TinyNet(), [*callbacks, look], train, **{"max_epochs": 1, **kwargs})
    return look


def warned_of(callbacks: list[Any], train: Any = None, **kwargs: Any) -> str:
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
        ([GhostBNCallback(size=8)], 8),
        ([GhostBNCallback(size=100)], 8),
        ([GhostBNCallback(size=4)], 4),
        ([GhostBNCallback(size=3)], 3),
        ([GhostBNCallback(size=5)], 4),
        ([GhostBNCallback(splits=3)], 3),
        ([GhostBNCallback(splits=100)], 1),
        ([GhostBNCallback(size=4, grouping="contiguous")], 4),
        ([SyncBNCallback()], 8),
    ],
)
@pytest.mark.parametrize("accumulated", [1, 4])
def test_it_is_that_of_the_largest_group_and_accumulation_changes_nothing(
    callbacks: list[Any], size: int, accumulated: int
) -> None:
    look = seen(callbacks, accumulate_grad_batches=accumulated)
    assert look.training == [both(size)] * 4
    assert look.validating == [both(size)] * 2, "while the model is evaluated it is still that of training"
    assert look.at_the_end == both(size)


@pytest.mark.parametrize("options", [{"size": 3}, {"splits": 3}, {"size": 1}, {"splits": 5}])
@pytest.mark.parametrize("samples", [2, 7, 8, 33])
def test_ghosts_are_as_large_as_what_the_layer_hands_to_batch_norm(
    options: Any, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous ones, which are a call each; with several values a sample, so that a group may be of one."""
    handed: list[int] = []
    own = F.batch_norm

    def batch_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        handed.append(len(input))
        return own(input, *args, **kwargs)

    module = TinyNet()
    with ghost_bn(module, grouping="contiguous", **options):
        said = normalization_batch_size(trainer_with(), module, samples=samples)
        monkeypatch.setattr(ghost, "F", SimpleNamespace(batch_norm=batch_norm))
        monkeypatch.setattr(BatchNormCall, "run", lambda call: batch_norm(*call))  # where the whole batch is one group
        module.bn1(torch.randn(samples, 4, 2, 2))
    assert sum(handed) == samples
    assert said["bn1"] == max(handed)


def labels(batch: Any) -> Tensor:
    return batch[1]


def test_domains_of_samples_are_as_large_as_the_largest() -> None:
    """A class each; levels, and datasets a batch, are whole batches."""
    largest = [both(int(y.bincount().max())) for _, y in train_loader()]
    apart, together = (
        DomainSpecificBNCallback(3, domain_fn=labels, train_statistics=s, population_statistics=s)
        for s in ("domain", "shared")
    )
    assert seen([apart], train_loader()).training == largest and max(v["bn1"] for v in largest) < 8
    assert seen([together], train_loader()).training == [both(8)] * 4
    assert seen([DomainSpecificBNCallback(3, domain_fn=len)], train_loader(16, 8)).training == [both(8)] * 2


def test_of_chosen_layers_alone() -> None:
    assert seen([GhostBNCallback(size=2, layers="bn2")]).training[0] == {"bn1": 8, "bn2": 2}
    assert normalization_batch_size(trainer_with(), TinyNet(), samples=3, layers="*2") == {"bn2": 3}


def test_within_a_batch_it_is_that_batch_and_between_batches_the_loaders() -> None:
    look = seen([], train_loader(20, 8))
    assert look.training == [both(8), both(8), both(4)]
    assert look.at_the_end == both(8)


def test_frozen_layers_and_layers_in_eval_mode_normalize_with_the_population() -> None:
    module = TinyNet()
    module.bn2.eval()
    look = seen(
        [FreezeBNCallback(start_step=2, statistics="ema", layers="bn1"), GhostBNCallback(size=4)], module=module
    )
    assert [row["bn1"] for row in look.training[:2]] == [4, 4]
    assert all(math.isnan(row["bn1"]) for row in look.training[3:])
    assert all(math.isnan(row["bn2"]) for row in [*look.training, *look.validating])


def test_layers_frozen_by_base_finetuning_in_train_mode_normalize_with_the_batch() -> None:
    """As they do: the layer's output depends on what else is in the batch."""
    module = TinyNet()
    BaseFinetuning.freeze_module(module.bn1)
    x = torch.randn(8, 4, 3, 3)
    assert not torch.allclose(module.bn1(x)[0], module.bn1(x[:4])[0])
    assert normalization_batch_size(trainer_with(), module, samples=8) == both(8)


def test_outside_a_fit_it_takes_samples() -> None:
    trainer, module = trainer_with(), TinyNet()
    assert normalization_batch_size(trainer, module, samples=6) == both(6)
    with freeze_bn(module, layers="bn1"), ghost_bn(module, splits=2):
        sizes = normalization_batch_size(trainer, module, samples=6)
    assert math.isnan(sizes["bn1"]) and sizes["bn2"] == 3
    with pytest.raises(ValueError, match="pass samples="):
        normalization_batch_size(trainer, module)
    trainer.validate(module, val_loader(), verbose=False)
    assert set(normalization_batch_size(trainer, module, samples=6)) == {"bn1", "bn2"}


def test_a_loader_without_a_batch_size_is_asked_for_samples() -> None:
    ready_made = DataLoader(list(train_loader()), batch_size=None)
    look = Look()
    with pytest.raises(ValueError, match=r"no train dataloader that has a batch_size: pass samples="):
        fit(TinyNet(), look, ready_made, val=None, max_epochs=1)
    assert look.training == [both(8)] * 4 and not look.at_the_end, "within batches it is known"


def test_freezing_warns_by_it() -> None:
    """From 16 samples on freezing costs accuracy; with ghosts of 8 in a batch of 32 it does not."""
    freeze = FreezeBNCallback(start_step=1, statistics="ema")
    assert "holds 32 samples" in warned_of([freeze], train_loader(64, 32))
    assert "normalization batch" not in warned_of([GhostBNCallback(size=8), freeze], train_loader(64, 32))


# ------------------------------------------------------------------------------------------------------ several ranks
def on_rank(callbacks: list[Any]) -> list[dict[str, float]]:
    return seen(callbacks, devices=2, strategy="ddp").training


def by_hand() -> dict[str, Any]:
    """What torch's own SyncBatchNorm, which does not run on the CPU, and groups of ranks say."""
    trainer, torchs, ours = trainer_with(), nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet()), TinyNet()
    of_one = torch.distributed.new_subgroups(1)[0]
    small = nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet(), of_one)
    with sync_bn(ours, group_size=2, layers="bn1"):
        return {
            "torch": normalization_batch_size(trainer, torchs, samples=8),
            "torch, group": normalization_batch_size(trainer, small, samples=8),
            "ours": normalization_batch_size(trainer, ours, samples=8),
        }


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("callbacks", "size"),
    [([], 8), ([SyncBNCallback()], 16), ([GhostBNCallback(size=2)], 2)],
    ids=["", "sync", "ghost"],
)
def test_ranks_change_it_only_where_they_share_statistics(callbacks: list[Any], size: int) -> None:
    assert run_on_ranks(on_rank, 2, callbacks) == [[both(size)] * 2] * 2


@pytest.mark.ddp
def test_it_counts_the_ranks_of_a_layers_own_group() -> None:
    for sizes in run_on_ranks(by_hand, 4):
        assert sizes == {"torch": both(32), "torch, group": both(8), "ours": {"bn1": 16, "bn2": 8}}


def synced_and_frozen() -> str:
    callbacks = [SyncBNCallback(), FreezeBNCallback(start_step=1, statistics="ema"), BNStatsMonitor(1, window=2)]
    return warned_of(callbacks, devices=2, strategy="ddp")


@pytest.mark.ddp
def test_freezing_warns_of_what_ranks_normalize_together() -> None:
    first, _ = run_on_ranks(synced_and_frozen, 2)
    assert "normalization batch holds 16 samples" in first
