"""A neutral zone leaves no trace of what forwards do in it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torchmetrics.classification import MulticlassAUROC

from lightning_bn.engine.neutral import neutral
from tests.callbacks.zoo import TinyNet, digest, random_states, state_but_statistics, trainer_with


@pytest.fixture
def trainer(tmp_path: Any) -> Trainer:
    trainer = trainer_with(logger=CSVLogger(tmp_path))
    trainer.state.stage = RunningStage.VALIDATING
    return trainer


class Hoarder(TinyNet):
    """Keeps state in every kind of attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(3)
        self.tensor = torch.zeros(3)
        self.tensors = [torch.zeros(3)]
        self.by_name = {"a": torch.zeros(3), "array": np.zeros(3)}
        self.recent = deque([torch.zeros(3)], maxlen=4)
        self.labels = {0}
        self.curve = MulticlassAUROC(3)

    def kept(self) -> Any:
        own = [self.array, self.tensor, self.tensors, self.by_name, list(self.recent), list(self.labels)]
        return digest([own, self.curve.preds, state_but_statistics(self)])


def in_place(m: Any) -> None:
    m.array += 1
    m.tensor.add_(1)
    m.tensors[0].add_(1)
    m.by_name["a"].add_(1)
    m.by_name["array"] += 1
    m.recent[0].add_(1)


def by_growing(m: Any) -> None:
    m.tensors.append(torch.ones(3))
    m.by_name["b"] = torch.ones(3)
    m.recent.append(torch.ones(3))
    m.labels.add(1)


def by_assignment(m: Any) -> None:
    m.array, m.tensor, m.tensors, m.by_name = np.ones(3), torch.ones(3), [], {}
    m.recent, m.labels = deque(), {2}
    m.new_attribute = 1
    m.queue = torch.ones(8, 6)


def in_buffers(m: Any) -> None:
    m.queue.add_(1)
    m.bn1.running_mean.add_(1)
    m.bn1.num_batches_tracked.add_(1)


def in_metrics(m: Any) -> None:
    m.accuracy(torch.eye(3), torch.arange(3))
    m.curve.update(torch.eye(3), torch.arange(3))
    m.average_loss.reset()


def in_modes(m: Any) -> None:
    m.train()
    m.drop.p = 0.9
    m.bn1.momentum = None


@pytest.mark.parametrize("change", [in_place, by_growing, by_assignment, in_buffers, in_metrics, in_modes])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, StopIteration])
def test_state_of_modules_is_as_before(trainer: Trainer, change: Callable[[Any], None], error: Any) -> None:
    module = Hoarder().eval()
    module.curve.update(torch.eye(3), torch.arange(3))
    before, buffers, names = module.kept(), digest(module.state_dict()), set(vars(module))
    try:
        with neutral(trainer, module):
            change(module)
            assert (module.kept(), digest(module.state_dict())) != (before, buffers), "the change does nothing"
            if error:
                raise error
    except (ValueError, KeyboardInterrupt, StopIteration):
        pass
    assert module.kept() == before
    assert digest(module.state_dict()) == buffers
    assert set(vars(module)) == names


def test_tensors_keep_their_identity(trainer: Trainer) -> None:
    module = TinyNet()
    before = {name: id(b) for name, b in module.named_buffers()}
    with neutral(trainer, module):
        module.queue.add_(1)
    assert {name: id(b) for name, b in module.named_buffers()} == before


def test_random_numbers_go_on_as_if_none_had_been_drawn(trainer: Trainer) -> None:
    before = digest(list(random_states()))
    with neutral(trainer, TinyNet()):
        assert torch.rand(1) is not None and np.random.rand() and random.random()
        assert digest(list(random_states())) != before
    assert digest(list(random_states())) == before


class Augmentation:
    """What a module holds to augment with."""

    def __init__(self) -> None:
        self.steps = [random.Random(0), np.random.default_rng(0)]


def test_random_numbers_of_the_modules_own_go_on_as_if_none_had_been_drawn(trainer: Trainer) -> None:
    module = TinyNet()
    module.generator, module.augmentation = torch.Generator(), Augmentation()
    first, second = module.augmentation.steps

    def draw() -> list[float]:
        return [torch.rand(1, generator=module.generator).item(), first.random(), second.random()]

    with neutral(trainer, module):
        drawn = draw()
        assert draw() != drawn
    assert draw() == drawn


def test_logging_is_muted_and_the_stage_reads_as_training(trainer: Trainer, tmp_path: Any) -> None:
    module, loggers = TinyNet(), list(trainer.loggers)
    trainer.strategy.connect(module)
    module.trainer = trainer
    with neutral(trainer, module):
        assert trainer.training
        module.log("train_loss", 1.0)
        module.log_dict({"train_accuracy": 1.0})
        module.logger.log_metrics({"train_loss": 1.0}, step=0)
        module.logger.experiment.anything_at_all(1)
        assert module.logger.log_dir == loggers[0].log_dir  # where a step may want to write a file
    assert trainer.loggers == loggers and trainer.state.stage == RunningStage.VALIDATING
    assert not trainer.fit_loop.epoch_loop._results
    assert not list(tmp_path.rglob("metrics.csv"))
    assert module.log.__func__ is TinyNet.log


def test_forwards_run_without_gradients_also_within_inference_mode(trainer: Trainer) -> None:
    module = TinyNet()
    with torch.inference_mode():
        with neutral(trainer, module):
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            module.queue.add_(1)
        assert torch.is_inference_mode_enabled()


def test_gradients_of_an_unfinished_accumulation_are_kept(trainer: Trainer) -> None:
    module, x = TinyNet(), torch.randn(2, 3, 6, 6)
    module(x).sum().backward()
    before = digest([p.grad for p in module.parameters()])
    with neutral(trainer, module), torch.enable_grad():
        module(x).square().sum().backward()
        module.zero_grad()
        module(x).square().sum().backward()
    assert digest([p.grad for p in module.parameters()]) == before


def momentum_update(weight: nn.Parameter) -> None:
    weight.data.mul_(0.9)


def replaced_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.9


def under_no_grad(weight: nn.Parameter) -> None:
    weight.copy_(weight * 0.9)


def zeroed(weight: nn.Parameter) -> None:
    weight.data.zero_()


@pytest.mark.parametrize("change", [momentum_update, replaced_data, under_no_grad, zeroed])
def test_changed_parameters_are_refused_by_name(trainer: Trainer, change: Callable[[Any], None]) -> None:
    module = TinyNet()
    refused = pytest.raises(RuntimeError, match=r"changed parameters of TinyNet \(conv2.weight and 0 more\).*forward=")
    with refused, neutral(trainer, module):
        change(module.conv2.weight)


def test_parameters_that_hold_nan_are_not_taken_for_changed(trainer: Trainer) -> None:
    module = TinyNet()
    nn.init.constant_(module.head.weight, torch.nan)
    with neutral(trainer, module):
        pass
