"""SyncBNCallback: a training on several ranks is one process that trains on all their batches as one."""

import copy
import pickle
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_bn import BNStatsMonitor, GhostBNCallback, SyncBNCallback
from tests.callbacks.zoo import At, TinyNet, fit, statistics_of, train_loader, trainer_with
from tests.ranks import run_on_ranks


def trained(world_size: int, callbacks: list[Any]) -> dict[str, Any]:
    """Two epochs in float64: 8 images a rank and step on two ranks, 4 on four, 16 in one process; the same ones."""
    module, glimpses = TinyNet(), []

    def glimpse(trainer: Trainer, pl_module: TinyNet, *_: Any) -> None:
        copies = copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))
        glimpses.append((list(pl_module.state_dict()), [type(twin.bn1) for twin in copies], repr(pl_module)))

    rank = dist.get_rank() if world_size > 1 else 0
    sampler = DistributedSampler(range(32), world_size, rank, shuffle=False)  # Lightning's would shuffle
    loader = train_loader(32, 16 // world_size, sampler=sampler)
    options = {"precision": "64-true", "devices": world_size, "val": None, "use_distributed_sampler": False}
    options["strategy"] = "ddp" if world_size > 1 else "auto"
    fit(module, [*callbacks, At(glimpse, "on_train_batch_start")], loader, **options)
    left = [(type(m), sorted(vars(m))) for m in (module.bn1, module.bn2)]
    numbers = {**{k: v.detach() for k, v in module.named_parameters()}, **statistics_of(module)}
    return {"numbers": numbers, "glimpses": glimpses, "left": left}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((value - theirs[key]).abs().max()) for key, value in ours.items())


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_training_is_that_of_one_process_on_the_concatenated_batches(world_size: int) -> None:
    results, alone = run_on_ranks(trained, world_size, world_size, [SyncBNCallback()]), trained(1, [])
    for result in results:
        assert largest_difference(result["numbers"], alone["numbers"]) < 1e-10
        for keys, classes, shown in result["glimpses"]:
            assert keys == list(TinyNet().state_dict()) and classes == [nn.BatchNorm2d] * 2
            assert f"synced over {world_size} ranks" in shown
        assert result["left"] == alone["left"]
    (unsynced, _) = run_on_ranks(trained, 2, 2, [])
    assert largest_difference(unsynced["numbers"], alone["numbers"]) > 1e-3


@pytest.mark.ddp
def test_layers_and_groups_of_ranks_are_those_chosen() -> None:
    first, *_, last = run_on_ranks(trained, 4, 4, [SyncBNCallback(group_size=2, layers="bn2")])
    for *_, shown in first["glimpses"] + last["glimpses"]:
        before, after = shown.split("(bn2)")
        assert "synced over 2 ranks" in after and "synced" not in before


def judged() -> dict[str, str]:
    """How the monitor gets at each layer's batches, with momentum 0 in the first."""
    monitor, module, found = BNStatsMonitor(1, window=2), TinyNet(), {}
    module.bn1.momentum = 0.0
    seen = lambda: (monitor._record and monitor._record.last and monitor._record.last.direct) or {}  # noqa: E731
    look = At(lambda *_: found.update(seen()), "on_train_batch_end")
    fit(module, [SyncBNCallback(), monitor, look], devices=2, strategy="ddp", max_epochs=1)
    return found


@pytest.mark.ddp
def test_the_monitor_measures_no_rank_alone_where_ranks_normalize_together() -> None:
    """What is recovered from the running statistics is the batch of all; inputs are those of one."""
    on_rank_0, _ = run_on_ranks(judged, 2)
    assert list(on_rank_0) == ["bn1"] and "synchronized over ranks" in on_rank_0["bn1"]


@pytest.mark.parametrize("callback", [SyncBNCallback(), GhostBNCallback(size=4)])
def test_a_strategy_that_shards_the_model_is_refused(callback: Any) -> None:
    trainer, module = trainer_with(callback), TinyNet()
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})  # known by its name
    with pytest.raises(RuntimeError, match=r"FSDPStrategy shards the model over ranks.*use DDP"):
        trainer.fit(module, train_loader())
    assert type(module.bn1) is nn.BatchNorm2d
