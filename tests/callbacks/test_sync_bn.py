"""SyncBNCallback: a training on several ranks is one process that trains on all their batches as one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_bn import (
    BNStatsMonitor,
    FreezeBNCallback,
    GhostBNCallback,
    PassConfig,
    PreciseBNCallback,
    SyncBNCallback,
)
from tests.callbacks.zoo import TinyNet, fit, statistics_of, train_loader, trainer_with
from tests.ranks import run_on_ranks


class Glimpse(Callback):
    """Looks at the module before every training batch: its keys, and the classes of its copies."""

    def __init__(self) -> None:
        self.keys: set[tuple[str, ...]] = set()
        self.classes: set[type] = set()
        self.shown = ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.keys.add(tuple(pl_module.state_dict()))
        self.classes |= {type(copy.deepcopy(pl_module).bn1), type(pickle.loads(pickle.dumps(pl_module)).bn1)}
        self.shown = repr(pl_module)


def numbers(module: TinyNet) -> dict[str, Tensor]:
    return {**{k: v.detach().clone() for k, v in module.named_parameters()}, **statistics_of(module)}


def trained(world_size: int, callbacks: list[Any]) -> tuple[TinyNet, Glimpse]:
    """Two epochs in float64: 8 images a rank and step on two ranks, 4 on four, 16 in one process; the same ones."""
    module, glimpse = TinyNet(), Glimpse()
    rank = dist.get_rank() if world_size > 1 else 0
    sampler = DistributedSampler(range(32), world_size, rank, shuffle=False)  # Lightning's would shuffle
    loader = train_loader(32, 16 // world_size, sampler=sampler)
    options = {"precision": "64-true", "devices": world_size, "val": None, "use_distributed_sampler": False}
    options["strategy"] = "ddp" if world_size > 1 else "auto"
    fit(module, [*callbacks, glimpse], loader, **options)
    return module, glimpse


def on_rank(world_size: int, callbacks: list[Any]) -> dict[str, Any]:
    module, glimpse = trained(world_size, callbacks)
    left = [(type(m), sorted(vars(m))) for m in (module.bn1, module.bn2)]
    return {"numbers": numbers(module), "glimpse": glimpse, "left": left}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((value - theirs[key]).abs().max()) for key, value in ours.items())


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_training_is_that_of_one_process_on_the_concatenated_batches(world_size: int) -> None:
    results = run_on_ranks(on_rank, world_size, world_size, [SyncBNCallback()])
    alone, _ = trained(1, [])
    for result in results:
        assert largest_difference(result["numbers"], numbers(alone)) < 1e-10
        glimpse = result["glimpse"]
        assert f"synced over {world_size} ranks" in glimpse.shown
        assert glimpse.classes == {nn.BatchNorm2d} and glimpse.keys == {tuple(TinyNet().state_dict())}
        plain = TinyNet()
        assert result["left"] == [(type(m), sorted(vars(m))) for m in (plain.bn1, plain.bn2)]
    (unsynced, _) = run_on_ranks(on_rank, 2, 2, [])
    assert largest_difference(unsynced["numbers"], numbers(alone)) > 1e-3


@pytest.mark.ddp
def test_layers_and_groups_of_ranks_are_those_chosen() -> None:
    first, *_, last = run_on_ranks(on_rank, 4, 4, [SyncBNCallback(group_size=2, layers="bn2")])
    assert all("synced over 2 ranks" in r["glimpse"].shown.split("(bn2)")[1] for r in (first, last))
    assert "synced" not in first["glimpse"].shown.split("(bn2)")[0]


def refusals() -> list[str]:
    sync, ghosts, found = SyncBNCallback, GhostBNCallback, []
    for callbacks in ([sync(), ghosts(2)], [ghosts(2), sync()], [sync(3)]):
        module = TinyNet()
        with pytest.raises((ValueError, TypeError)) as error:
            fit(module, callbacks, devices=2, strategy="ddp")
        assert type(module.bn1) is nn.BatchNorm2d, "something is left"
        found.append(str(error.value))
    return found


@pytest.mark.ddp
def test_refusals_on_ranks_name_the_layer_and_the_reason_in_both_orders() -> None:
    for first, second, third in run_on_ranks(refusals, 2):
        assert "SyncBNCallback and GhostBNCallback act on layer 'bn1'" in first
        assert "GhostBNCallback and SyncBNCallback act on layer 'bn1'" in second
        assert "group_size=3, but there are 2 ranks" in third


def with_others() -> dict[str, Tensor]:
    """With a pass, a freeze and the monitor: all of them wait for nobody where they need not."""
    freeze = FreezeBNCallback(start_epoch=1, precise=PassConfig(32), warmup_epochs=0)
    callbacks, module = [SyncBNCallback(), PreciseBNCallback(32), freeze, BNStatsMonitor(1, window=2)], TinyNet()
    fit(module, callbacks, train_loader(32, 8), devices=2, strategy="ddp", precision="64-true")
    return numbers(module)


@pytest.mark.ddp
def test_it_works_together_with_a_pass_a_freeze_and_the_monitor() -> None:
    """The freeze's statistics are a pass over what rank-sized batches say: the same on both ranks, and finite."""
    first, second = run_on_ranks(with_others, 2)
    assert largest_difference(first, second) == 0
    assert all(value.isfinite().all() for value in first.values())


def judged() -> dict[str, str]:
    """How the monitor gets at each layer's batches, with momentum 0 in the first."""
    monitor, module = BNStatsMonitor(1, window=2), TinyNet()
    module.bn1.momentum = 0.0
    found: dict[str, str] = {}

    class Judged(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if monitor._record and monitor._record.last:
                found.update(monitor._record.last.direct)

    fit(module, [SyncBNCallback(), monitor, Judged()], devices=2, strategy="ddp", max_epochs=1)
    return found


@pytest.mark.ddp
def test_the_monitor_measures_no_rank_alone_where_ranks_normalize_together() -> None:
    """What is recovered from the running statistics is the batch of all; inputs are those of one."""
    on_rank_0, _ = run_on_ranks(judged, 2)
    assert list(on_rank_0) == ["bn1"] and "synchronized over ranks" in on_rank_0["bn1"]


def test_one_process_is_as_it_was_and_warns_once() -> None:
    synced, plain = TinyNet(), TinyNet()
    with pytest.warns(UserWarning, match="sync_bn changes nothing: there is one process") as record:
        fit(synced, SyncBNCallback())
    assert len([w for w in record if "sync_bn" in str(w.message)]) == 1
    fit(plain)
    assert largest_difference(numbers(synced), numbers(plain)) == 0


def test_torchs_own_layers_are_left_to_torch_unless_groups_are_asked_for() -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet())
    with pytest.raises(TypeError, match=r"'bn1' is torch's SyncBatchNorm.*sync_batchnorm=False"):
        fit(module, SyncBNCallback(group_size=2))


@pytest.mark.parametrize("callback", [SyncBNCallback(), GhostBNCallback(size=4)])
def test_a_strategy_that_shards_the_model_is_refused(callback: Any) -> None:
    trainer, module = trainer_with(callback), TinyNet()
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})  # known by its name
    with pytest.raises(RuntimeError, match=r"FSDPStrategy shards the model over ranks.*use DDP"):
        trainer.fit(module, train_loader())
    assert type(module.bn1) is nn.BatchNorm2d
