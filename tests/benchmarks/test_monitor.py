"""What the monitor's benchmark times is what it says."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from benchmarks import monitor
from benchmarks.monitor import CYCLE, DEFAULT, Classifier, Row, Turns, _bytes, _fit
from benchmarks.timing import Spread
from lightning_bn.core.moments import Moments


class Clock:
    """Stands for the module `time`: it stands still unless somebody takes time."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


class Contestant(Callback):
    """Takes time at every batch's start and end."""

    def __init__(self, name: str, seconds: float, clock: Clock, seen: list[str]) -> None:
        self.on_train_batch_start = lambda *_: clock.take(seconds)
        self.on_train_batch_end = lambda *_: [clock.take(seconds), seen.append(name)]


def test_a_contestant_is_charged_for_its_own_turns_and_hooks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen, network = Clock(), list[str](), nn.Linear(2, 10)
    monkeypatch.setattr(monitor, "time", clock)
    network.register_forward_hook(lambda *_: clock.take(1))  # a second a batch
    contestants = {"a": Contestant("a", 0.0, clock, seen), "b": Contestant("b", 0.25, clock, seen)}
    turns = Turns(contestants, minutes=0.0, device="cpu")
    trainer = _fit(Classifier(network), torch.randn(1, 4, 2), [turns], [])
    assert "".join(seen[::CYCLE]) == "abba" and len(seen) == 4 * CYCLE  # whole cycles; who is first changes
    assert trainer.global_step == CYCLE + 4 * CYCLE + 1  # one warms up; one batch more, at whose start the last ended
    assert turns.hooks == {"a": [0.0, 0.0], "b": [0.5 * CYCLE] * 2}
    assert turns.seconds == {"a": [1.0 * CYCLE] * 2, "b": [1.5 * CYCLE] * 2}


def test_exactly_one_percent_is_not_under_one_percent() -> None:
    def row(percent: float) -> Row:
        return Row("net", DEFAULT, Spread(0.0, percent, 2.0), Spread(0.0, 0.0, 0.0), 1.0)

    assert [row(percent).missed() for percent in (0.999, 0.9996, 1.0)] == [False, True, True]


def test_memory_is_that_of_all_tensors_held() -> None:
    moments = Moments(*(torch.zeros(3, dtype=torch.float64) for _ in range(3)))
    assert _bytes({"a": [moments, "text", 7], "b": (torch.zeros(2), None), "layer": nn.Linear(2, 2)}) == 72 + 8
