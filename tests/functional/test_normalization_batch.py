"""`normalization_batch_size`: the number of samples behind a layer's batch statistics, in and outside a Trainer."""

import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

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

Sizes = list[dict[str, float]]


class Looking(Callback):
    """The sizes at every training batch; unless they vary, those at validation batches are the same."""

    def __init__(self, varies: bool) -> None:
        self.sizes, self.varies = list[dict[str, float]](), varies

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.sizes.append(normalization_batch_size(pl_module, samples=len(batch[0])))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self.varies:
            assert normalization_batch_size(pl_module, samples=8) == self.sizes[-1]


def seen(callbacks: list[Any], train: Any = None, module: Any = None, **kwargs: Any) -> Sizes:
    look = Looking(varies=train is not None)
    fit(module or TinyNet(), [*callbacks, look], train, **{"max_epochs": 1, **kwargs})
    return look.sizes


def warnings_of(callbacks: list[Any], train: Any = None, **kwargs: Any) -> str:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        seen(callbacks, train, **kwargs)
    return " ".join(str(w.message) for w in record)


def both(size: float) -> dict[str, float]:
    return {"bn1": size, "bn2": size}


@pytest.mark.parametrize(
    ("callbacks", "size"), [([], 8), ([GhostBNCallback(size=5)], 4), ([GhostBNCallback(splits=3)], 3)]
)
def test_it_is_that_of_the_largest_group_also_with_accumulation(callbacks: list[Any], size: int) -> None:
    assert seen(callbacks, accumulate_grad_batches=4) == [both(size)] * 4


@pytest.mark.parametrize(
    ("options", "samples"),
    [({"size": 3}, 33), ({"size": 3}, 2), ({"splits": 3}, 7), ({"size": 1}, 8), ({"splits": 5}, 8), ({"size": 9}, 8)],
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


def test_domains_of_samples_are_as_large_as_the_largest() -> None:
    largest = [both(int(y.bincount().max())) for _, y in train_loader()]
    apart, together = (
        DomainSpecificBNCallback(3, domain_fn=lambda batch: batch[1], train_statistics=s, population_statistics=s)
        for s in ("domain", "shared")
    )
    assert seen([apart], train_loader()) == largest and max(v["bn1"] for v in largest) < 8
    assert seen([together], train_loader()) == [both(8)] * 4
    assert seen([DomainSpecificBNCallback(3, domain_fn=len)], train_loader(16, 8)) == [both(8)] * 2


def test_it_is_nan_for_frozen_layers_and_layers_in_eval_mode() -> None:
    module = TinyNet()
    module.bn2.eval()
    freeze = FreezeBNCallback(start_step=2, statistics="ema", layers="bn1")
    sizes = seen([freeze, GhostBNCallback(size=4)], train_loader(), module)
    assert [row["bn1"] for row in sizes[:2]] == [4, 4]
    assert all(math.isnan(row["bn1"]) for row in sizes[3:])
    assert all(math.isnan(row["bn2"]) for row in sizes)


def test_a_plain_model_needs_no_trainer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    with freeze_bn(model, layers="0"), ghost_bn(model, splits=2, layers="1"):
        for mode in (True, False):
            sizes = normalization_batch_size(model.train(mode), samples=6)
            assert math.isnan(sizes["0"]) and sizes["1"] == 3
    assert normalization_batch_size(model.eval(), samples=6) == {"0": 6, "1": 6}
    model.train()[0].eval()
    assert math.isnan(normalization_batch_size(model, samples=6)["0"])
    BaseFinetuning.freeze_module(model[1])
    assert normalization_batch_size(model, samples=6, layers="1") == {"1": 6}


@pytest.mark.parametrize(("samples", "error"), [(0, ValueError), (2.5, TypeError), (None, TypeError)])
def test_samples_must_be_a_positive_number(samples: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="samples must be"):
        normalization_batch_size(TinyNet(), samples=samples)


def test_freezing_warns_from_16_samples_on_but_not_with_ghost_batches_of_8() -> None:
    freeze = FreezeBNCallback(start_step=1, statistics="ema")
    assert "holds 32 samples" in warnings_of([freeze], train_loader(64, 32))
    assert "normalization batch" not in warnings_of([GhostBNCallback(size=8), freeze], train_loader(64, 32))


def on_two_ranks() -> tuple[list[Sizes], str]:
    ddp: Any = {"devices": 2, "strategy": "ddp"}
    found = [seen(callbacks, **ddp) for callbacks in ([], [SyncBNCallback()], [GhostBNCallback(size=2)])]
    frozen = [SyncBNCallback(), FreezeBNCallback(start_step=1, statistics="ema"), BNStatsMonitor(1, window=2)]
    return found, warnings_of(frozen, **ddp)


@pytest.mark.ddp
def test_ranks_change_it_only_if_they_share_statistics() -> None:
    first, second = run_on_ranks(on_two_ranks, 2)
    assert first[0] == second[0] == [[both(size)] * 2 for size in (8, 16, 2)]
    assert "normalization batch holds 16 samples" in first[1]


def on_four_ranks() -> dict[str, Any]:
    """Sizes with torch's SyncBatchNorm, which does not run on the CPU, and with groups of ranks."""
    torchs, ours = nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet()), TinyNet()
    of_one = torch.distributed.new_subgroups(1)[0]
    small = nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet(), of_one)
    with sync_bn(ours, group_size=2, layers="bn1"):
        models = {"torch": torchs, "torch, group": small, "ours": ours}
        return {name: normalization_batch_size(model, samples=8) for name, model in models.items()}


@pytest.mark.ddp
def test_it_counts_the_ranks_of_a_layers_own_group() -> None:
    for sizes in run_on_ranks(on_four_ranks, 4):
        assert sizes == {"torch": both(32), "torch, group": both(8), "ours": {"bn1": 16, "bn2": 8}}
