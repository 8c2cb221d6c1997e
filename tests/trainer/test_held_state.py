"""What a step collects in containers and objects, at any depth, is as before a pass, and so is each object itself."""

import queue
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_bn.trainer.isolation import isolate
from tests.callbacks.zoo import TinyNet, digest, trainer_with


@dataclass
class Log:
    """Nested state of a helper."""

    losses: list[Tensor] = field(default_factory=list)
    by_class: dict[int, Counter[str]] = field(default_factory=dict)


class Slotted:
    __slots__ = ("array", "number")

    def __init__(self) -> None:
        self.array, self.number = np.zeros(2), 0


class Named(NamedTuple):
    rows: list[int]
    log: Log


class Tracker:
    """A helper object, with a lock and a queue that other threads use."""

    def __init__(self) -> None:
        self.lock, self.queue, self.count = threading.Lock(), queue.Queue[int](), 0
        self.log = Log([torch.zeros(2)], {0: Counter(a=1)})


class Collecting(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, list[Any]] = defaultdict(list, train=[{"loss": torch.zeros(1)}])
        self.recent = deque([{"x": [torch.zeros(1)]}], maxlen=3)
        self.tracker, self.slotted, self.named = Tracker(), Slotted(), Named([1], Log())
        self.meters = {"loss": [MeanMetric()]}
        self.teacher = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))]  # hidden from the optimizer
        self.ordered = OrderedDict(a=[1], b=[2])
        self.shared = torch.zeros(2)
        self.views = {"shared": [self.shared]}
        calls: list[int] = []
        self.count_call = lambda: calls.append(1)
        self.calls = partial(len, calls)
        self.itself = [self]

    def state(self) -> Any:
        meter, tracker, teacher = self.meters["loss"][0], self.tracker, self.teacher[0]
        return digest(
            [
                dict(self.outputs),
                list(self.recent),
                [tracker.count, tracker.log.losses, {k: dict(v) for k, v in tracker.log.by_class.items()}],
                [self.slotted.array, self.slotted.number, self.named.rows, self.named.log.losses],
                [meter.mean_value, meter.weight, teacher.state_dict()],
                list(self.ordered.items()),
                [self.shared, self.views["shared"], self.calls()],
            ]
        )


def grow(m: Collecting) -> None:
    m.outputs["train"].append({"loss": torch.ones(1)})
    m.outputs["val"].append(1)
    m.recent.append({"x": []})
    m.recent[0]["x"].append(1)
    m.tracker.count += 1
    m.tracker.log.losses.append(torch.ones(2))
    m.tracker.log.by_class[0]["a"] += 1
    m.slotted.number += 1
    m.named.rows.append(2)
    m.named.log.losses.append(torch.ones(1))
    m.ordered.move_to_end("a")
    m.count_call()


def change_in_place(m: Collecting) -> None:
    m.outputs["train"][0]["loss"].add_(1)
    m.recent[0]["x"][0].add_(1)
    m.tracker.log.losses[0].add_(1)
    m.slotted.array += 1
    m.shared.add_(1)
    assert m.views["shared"][0] is m.shared


def use(m: Collecting) -> None:
    m.meters["loss"][0].update(torch.ones(2))
    m.teacher[0](torch.randn(4, 2))
    with torch.no_grad():
        for p in m.teacher[0].parameters():
            p.lerp_(torch.ones_like(p), 0.5)


@pytest.mark.parametrize("change", [grow, change_in_place, use])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_state_at_any_depth_is_restored(change: Callable[[Collecting], None], error: Any) -> None:
    module = Collecting()
    state, lists = module.state(), (module.outputs, module.outputs["train"], module.tracker.log, module.teacher[0])
    try:
        with isolate(trainer_with(), module):
            change(module)
            assert module.state() != state, "the change does nothing"
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert module.state() == state
    assert (module.outputs, module.outputs["train"], module.tracker.log, module.teacher[0]) == lists
    assert isinstance(module.outputs, defaultdict) and module.outputs["other"] == []


def test_what_other_threads_use_is_left_alone() -> None:
    module = Collecting()
    with isolate(trainer_with(), module):
        module.tracker.queue.put(1)
        assert module.tracker.lock.acquire(blocking=False)
    assert module.tracker.queue.get_nowait() == 1 and module.tracker.lock.locked()


def test_a_data_module_is_restored_without_copies_of_its_data() -> None:
    class Data(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.batches, self.seen = torch.zeros(2), 0, [0]

    trainer, data = trainer_with(), Data()
    images = data.images
    trainer.datamodule = data
    with isolate(trainer, TinyNet()):
        assert data.images is images
        data.batches += 1
        data.seen.append(1)
    assert (data.batches, data.seen) == (0, [0])


def test_a_tensor_that_cannot_be_protected_is_named_once() -> None:
    module, trainer = TinyNet(), trainer_with()
    module.pair = (torch.zeros(1), 0)
    with (
        pytest.warns(UserWarning, match=r"cannot restore: TinyNet\.pair\[0\]\. Hold them in a list"),
        isolate(trainer, module),
    ):
        module.pair[0].add_(1)
    with isolate(trainer, module):  # a second warning would be an error
        module.pair[0].add_(1)


def test_objects_that_refer_to_a_trainer_or_to_each_other_end() -> None:
    module, trainer = Collecting(), Trainer(logger=False, enable_checkpointing=False)
    module.tracker.owner, module.tracker.trainer = module, trainer  # type: ignore[attr-defined]
    trainer.strategy.connect(module)
    with isolate(trainer, module):
        module.tracker.count += 1
    assert module.tracker.count == 0
