"""What a step collects in containers and objects, at any depth, is as before a pass, and so is each object itself."""

import queue
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
    """A helper object with a lock."""

    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0
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


def test_what_other_threads_or_files_use_is_left_alone(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.queue, self.file, self.number = queue.Queue[int](), (tmp_path / "0").open("w"), 0

    module = TinyNet()
    module.writer = Writer()
    with isolate(trainer_with(), module):
        module.writer.queue.put(1)
        module.writer.file.close()
        module.writer.file, module.writer.number = (tmp_path / "1").open("w"), 1
    module.writer.file.write("still open")
    module.writer.file.close()
    assert module.writer.queue.get_nowait() == 1 and module.writer.number == 1


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
        pytest.warns(UserWarning, match=r"cannot restore: TinyNet\.pair\[0\]\. Hold tensors in a list"),
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


class Odd(dict):  # type: ignore[type-arg]
    """Converts what it is given, has attributes, and does not tell the truth about its keys."""

    step = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, [value])

    def items(self) -> Any:
        raise RuntimeError("not now")


class Alike:
    """A key whose comparison returns no bool, as those of tensors and arrays do."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> Any:
        return np.zeros(2)


class Pushy:
    __slots__ = ("number",)

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_objects_that_do_not_behave_as_their_class_do_not_end_a_pass() -> None:
    module, target = TinyNet(), Odd()
    module.odd, module.keyed, module.pushy = Odd(a=1), {Alike(): 1}, Pushy()
    module.odd.step, module.hidden = 0, [1]
    module.mapping, module.kind, module.proxy = vars(Odd), list, weakref.proxy(target)
    module.alias = list[int]
    del target
    with isolate(trainer_with(), module):
        module.odd["a"], module.odd.step = 2, 1
        module.keyed[Alike()] = 2
        module.pushy.number = 3
        module.hidden.append(2)
    assert dict.__getitem__(module.odd, "a") == 1 and module.odd.step == 0
    assert len(module.keyed) == 1 and module.hidden == [1]


def test_what_is_being_iterated_over_stays_valid() -> None:
    module = TinyNet()
    module.memory, module.by_name = deque([torch.zeros(1)] * 3), OrderedDict(a=torch.zeros(1), b=torch.zeros(1))
    iterators = iter(module.memory), iter(module.by_name)
    [next(i) for i in iterators]
    with isolate(trainer_with(), module):
        module.memory[1].add_(1)
    assert [len(list(i)) for i in iterators] == [2, 1]


def test_a_module_of_the_data_is_restored_as_well() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.calls, self.bn = torch.Generator(), 0, nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.bn(x + torch.randn(x.shape, generator=self.generator))

    trainer, data = trainer_with(), LightningDataModule()
    data.noise = Noise()
    trainer.datamodule = data
    before = digest([data.noise.state_dict(), data.noise.generator.get_state()])
    with isolate(trainer, TinyNet()):
        data.noise(torch.randn(4, 2))
    assert data.noise.calls == 0
    assert digest([data.noise.state_dict(), data.noise.generator.get_state()]) == before


def test_views_of_one_tensor_are_views_in_a_pass_and_large_data_are_not_copied() -> None:
    module = TinyNet()
    module.flat = torch.zeros(6)
    module.parts = [module.flat[:2], module.flat[2:]]
    module.wide = torch.zeros(1).expand(10**9)
    with isolate(trainer_with(), module):
        module.flat.add_(1)
        assert module.parts[1].sum() == 4
    assert module.flat.sum() == 0 and module.parts[0].data_ptr() == module.flat.data_ptr()


def test_rates_that_a_step_changes_are_restored() -> None:
    trainer, module = trainer_with(), TinyNet()
    trainer.strategy.connect(module)
    trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), 0.1)]
    with isolate(trainer, module):
        trainer.optimizers[0].param_groups[0]["lr"] = 0.5
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
