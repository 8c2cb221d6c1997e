"""Operators and waits for the device are within the limits of benchmarks/RESULTS.md, and are counted correctly."""

import pytest
import torch

from benchmarks import operators
from benchmarks.operators import OperatorCount, callbacks, verbs


def test_operators_and_waits_are_counted() -> None:
    x = torch.ones(4)
    with OperatorCount() as count:
        y = (x + 1).view(2, 2)
    assert (count.operators.total(), count.waits) == (2, 0)
    with OperatorCount() as count:
        bool(y.sum() > 1), y.tolist(), x[x > 0], y.cpu(), torch.equal(x, x)
    assert count.waits == 5


def test_functions_are_within_their_limits() -> None:
    assert [row for row in verbs("resnet50") if row.missed] == []


def test_callbacks_are_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "BATCHES", 4)
    assert [row for row in callbacks("resnet18") if row.missed] == []
