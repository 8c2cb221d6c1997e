"""After isolation everything that forwards have changed is as before."""

import contextlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.nn.parameter import is_lazy
from torchmetrics.classification import MulticlassAUROC

from lightning_bn.trainer.isolation import isolate
from tests.callbacks.zoo import TinyNet, digest, random_states, state_but_statistics, trainer_with


@pytest.fixture
def trainer(tmp_path: Any) -> Trainer:
    trainer = trainer_with(logger=CSVLogger(tmp_path))
    trainer.state.stage = RunningStage.VALIDATING
    return trainer


class Stateful(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.array, self.tensor, self.labels, self.curve = np.zeros(3), torch.zeros(3), {0}, MulticlassAUROC(3)

    def state(self) -> Any:
        attributes = [self.array, self.tensor, list(self.labels), self.curve.preds]
        return digest([attributes, state_but_statistics(self), self.state_dict()])


CHANGES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "in place": (lambda m: (m.array.__iadd__(1), m.tensor.add_(1), m.labels.add(1)), None),
    "by assignment": (
        lambda m: vars(m).update(array=1, tensor=1, labels={2}, new=1),
        KeyboardInterrupt,
    ),
    "a buffer replaced": (lambda m: setattr(m, "queue", torch.ones(8, 6)), None),
    "buffers": (lambda m: [b.add_(1) for b in (m.queue, m.bn1.running_mean, m.bn1.num_batches_tracked)], StopIteration),
    "metrics": (
        lambda m: (m.accuracy(torch.eye(3), torch.arange(3)), m.curve.reset(), m.average_loss.reset()),
        ValueError,
    ),
    "modes": (lambda m: (m.train(), vars(m.drop).update(p=0.9), vars(m.bn1).update(momentum=None)), None),
}
"""Name -> change, and an error that is raised after it."""


@pytest.mark.parametrize(("change", "error"), CHANGES.values(), ids=CHANGES)
def test_the_state_of_modules_is_restored(trainer: Trainer, change: Callable[[Any], Any], error: Any) -> None:
    module = Stateful().eval()
    module.curve.update(torch.eye(3), torch.arange(3))
    state, names, buffers = module.state(), set(vars(module)), [id(b) for b in module.buffers()]
    with pytest.raises(error) if error else contextlib.nullcontext(), isolate(trainer, module):
        change(module)
        assert module.state() != state, "the change does nothing"
        if error:
            raise error
    assert module.state() == state
    assert set(vars(module)) == names and [id(b) for b in module.buffers()] == buffers


def test_random_number_generators_are_restored(trainer: Trainer) -> None:
    module, steps = TinyNet(), [random.Random(0), np.random.default_rng(0)]
    module.generator, module.augmentation = torch.Generator(), SimpleNamespace(steps=steps)

    def draw() -> list[float]:
        return [torch.rand(1, generator=module.generator).item(), *(step.random() for step in steps)]

    before = digest(list(random_states()))
    with isolate(trainer, module):
        drawn = draw()
        assert draw() != drawn
        assert torch.rand(1) is not None and np.random.rand() and random.random()
        assert digest(list(random_states())) != before
    assert digest(list(random_states())) == before
    assert draw() == drawn


def test_logging_is_muted_and_the_stage_reads_as_training(trainer: Trainer, tmp_path: Any) -> None:
    module, loggers = TinyNet(), list(trainer.loggers)
    trainer.strategy.connect(module)
    module.trainer = trainer
    with isolate(trainer, module):
        assert trainer.training
        module.log("train_loss", 1.0)
        module.log_dict({"train_accuracy": 1.0})
        module.logger.log_metrics({"train_loss": 1.0}, step=0)
        module.logger.experiment.anything_at_all(1)
        for name in ("save_dir", "log_dir", "name", "version"):  # where a step may want to write a file
            assert getattr(module.logger, name) == getattr(loggers[0], name)
    assert trainer.loggers == loggers and trainer.state.stage == RunningStage.VALIDATING
    assert not trainer.fit_loop.epoch_loop._results
    assert not list(tmp_path.rglob("metrics.csv"))
    assert module.log.__func__ is TinyNet.log


def test_forwards_run_without_gradients_and_those_of_an_unfinished_accumulation_are_kept(trainer: Trainer) -> None:
    module, x = TinyNet(), torch.randn(2, 3, 6, 6)
    with torch.inference_mode():
        with isolate(trainer, module):
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            module.queue.add_(1)
        assert torch.is_inference_mode_enabled()
    module(x).sum().backward()
    before = digest([p.grad for p in module.parameters()])
    with isolate(trainer, module), torch.enable_grad():
        module(x).square().sum().backward()
        module.zero_grad()
        module(x).square().sum().backward()
    assert digest([p.grad for p in module.parameters()]) == before


class Changing(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        flat = torch.arange(1.0, 7.0)
        self.overlapping = nn.ParameterList([nn.Parameter(flat[:4]), nn.Parameter(flat[2:])])
        self.row = nn.Parameter(torch.ones(1000, 3)[5])
        self.embedding = nn.Embedding(4, 3, max_norm=0.01)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.lstm = nn.LSTM(3, 3)
        self.later = nn.LazyLinear(3)
        self.later_norm = nn.LazyBatchNorm1d()
        self.count = nn.Parameter(torch.arange(3), requires_grad=False)
        self.waves = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.tied = self.head.weight

    def state(self) -> Any:
        """Everything about parameters that optimizers, DDP and autograd graphs could hold."""
        named = [*self.named_parameters(remove_duplicate=False), *self.named_buffers()]
        modules = [(name, type(m), list(m._forward_pre_hooks.values())) for name, m in self.named_modules()]
        return modules, [
            (name, id(t), type(t), t.requires_grad, t.dtype, None if is_lazy(t) else (t.data_ptr(), digest(t.data)))
            for name, t in named
        ]


def by_other_data(m: Changing) -> None:
    m.conv2.weight.data = m.conv2.weight.data * 0.9


def under_no_grad(m: Changing) -> None:
    torch._foreach_lerp_([m.conv2.weight, m.conv2.bias], [m.conv2.weight * 2, m.conv2.bias * 2], 0.5)


def by_an_optimizer(m: Changing) -> None:
    with torch.enable_grad():
        m(torch.randn(2, 3, 6, 6)).sum().backward()
    torch.optim.SGD(m.parameters(), 0.1).step()


def replaced_added_and_deleted(m: Changing) -> None:
    m.conv1.half()
    m.conv2.weight = nn.Parameter(torch.zeros(1))
    m.head, m.bn3, m.more = nn.Linear(6, 3), nn.BatchNorm1d(2), nn.Parameter(torch.ones(2))
    m.register_buffer("passing", torch.ones(2), persistent=False)
    del m.conv2.bias, m.bn1


def overlapping(m: Changing) -> None:
    first, second = m.overlapping
    first.zero_()
    assert second[0] == 0, "the copies must share memory as well"


def weights_of_an_rnn(m: Changing) -> None:
    x = torch.randn(2, 1, 3)
    before, _ = m.lstm(x)
    m.lstm.weight_ih_l0.data.mul_(2)
    assert not torch.equal(before, m.lstm(x)[0])


PARAMETERS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "in place, through data": (lambda m: m.conv2.weight.data.mul_(0.9), None),
    "other data": (by_other_data, None),
    "under no_grad": (under_no_grad, None),
    "other types": (lambda m: (m.count.add_(1), m.waves.data.mul_(1j)), None),
    "an optimizer": (by_an_optimizer, None),
    "overlapping": (overlapping, None),
    "max_norm and a parametrization": (
        lambda m: (m.embedding(torch.arange(4)), setattr(m.normed, "weight", torch.ones(3, 3))),
        None,
    ),
    "weights of an RNN": (weights_of_an_rnn, None),
    "replaced": (replaced_added_and_deleted, KeyboardInterrupt),
    "lazy ones initialized": (lambda m: (m.later(torch.ones(2, 4)), m.later_norm(torch.ones(2, 4))), KeyboardInterrupt),
    "flags and hooks": (
        lambda m: (m.conv2.requires_grad_(False), m.conv2.register_forward_pre_hook(lambda *_: None)),
        KeyboardInterrupt,
    ),
}
"""Name -> change, and an error that is raised after it."""
in_place_through_data, of_other_types = (PARAMETERS[name][0] for name in ("in place, through data", "other types"))


@pytest.mark.parametrize(("change", "error"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_are_restored_bit_for_bit(trainer: Trainer, change: Callable[[Any], None], error: Any) -> None:
    module = Changing()
    before = module.state()
    with pytest.raises(error) if error else contextlib.nullcontext(), isolate(trainer, module) as fixed, fixed():
        assert module.row.untyped_storage().nbytes() == 12, "the copy of a part of a large tensor is small"
        copies = module.state()
        change(module)
        assert module.state() != copies, "the change does nothing"
        if error:
            raise error
    assert module.state() == before


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        *[(change, [True] * 3) for change in (in_place_through_data, by_other_data, of_other_types)],
        *[(change, [False, True, False, True]) for change in (by_other_data, under_no_grad)],
    ],
)
def test_every_forward_begins_with_the_same_parameters(trainer: Trainer, change: Any, changes: list[bool]) -> None:
    """Otherwise a momentum encoder would move with every batch of a pass."""
    module = Changing()
    before = digest([p.data for p in module.parameters() if not is_lazy(p)])
    with isolate(trainer, module) as fixed:
        for changes_now in changes:
            with fixed():
                assert digest([p.data for p in module.parameters() if not is_lazy(p)]) == before
                if changes_now:
                    change(module)


def test_suspended_forwards_begin_with_the_same_parameters(trainer: Trainer) -> None:
    """In lockstep a forward begins while others are suspended; the step changes them before its first layer."""
    module = Changing()
    before = digest(module.conv2.weight.data)
    with isolate(trainer, module) as fixed:
        forwards = [fixed() for _ in range(3)]
        for forward in forwards:
            forward.__enter__()
            assert digest(module.conv2.weight.data) == before
            in_place_through_data(module)
        for forward in forwards:
            forward.__exit__(None, None, None)


def test_an_autograd_graph_from_before_stays_valid(trainer: Trainer) -> None:
    module, x = Changing(), torch.randn(4, 3)
    loss = module.normed(x).square().sum() + (module.lstm(x[None])[0] * module.row).sum()
    with isolate(trainer, module) as fixed:
        for _ in range(2):
            with fixed():
                module.normed(x), module.lstm(x[None]), in_place_through_data(module)
    loss.backward()
    twin = Changing()
    twin.load_state_dict(module.state_dict())
    (twin.normed(x).square().sum() + (twin.lstm(x[None])[0] * twin.row).sum()).backward()
    assert digest([p.grad for p in module.parameters()]) == digest([p.grad for p in twin.parameters()])


def test_parameters_made_in_inference_mode_can_be_isolated(trainer: Trainer) -> None:
    with torch.inference_mode():
        module = TinyNet()
    before = digest(module.state_dict())
    with isolate(trainer, module) as fixed:
        for _ in range(2):
            with fixed():
                module(torch.randn(2, 3, 6, 6)), by_other_data(module)
    assert digest(module.state_dict()) == before
