"""domain_bn on feature levels: torchvision's heads as they are, against Table 5's rows written out by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bn import domain_bn, find_bn
from tests.functional.domains import (
    HEADS,
    OWNERS,
    ROWS,
    Unrolled,
    choices,
    levels,
    outputs_and_gradients,
)


def given(head: nn.Module, row: int, domains: int = 3, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return domain_bn(head, domains=domains, owner=OWNERS, **choices(row), **options)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_head_trains_and_evaluates_as_its_row_of_table_5(make: Any, row: int) -> None:
    head = make()
    handle = given(head, row)
    by_hand = Unrolled(head, row, 3)
    for step in range(3):
        ours = outputs_and_gradients(head, head, levels(seed=step))
        theirs = outputs_and_gradients(by_hand, by_hand.head, levels(seed=step))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for name, layer in find_bn(head).items():
        truth = by_hand.head.get_submodule(name)
        torch.testing.assert_close(layer.running_mean, truth.running_mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(layer.running_var, truth.running_var, rtol=1e-11, atol=1e-12)
        assert int(layer.num_batches_tracked) == 3
        if ROWS[row][1] == "domain":
            table = next(b for owner, b in by_hand.by_hand.items() if name.startswith(owner))
            own = handle.state()[name]
            torch.testing.assert_close(own["domain_mean"], table.means[truth], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(own["domain_var"], table.variances[truth], rtol=1e-11, atol=1e-12)
    head.eval(), by_hand.eval()
    for a, b in zip(head(levels()).values(), by_hand(levels()).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    handle.undo()
    assert [type(m) for m in head.modules()] == [type(m) for m in make().modules()]
