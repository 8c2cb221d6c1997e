"""precise_bn on layers with domains: each domain's statistics, and all together, against float64 by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import find_bn, precise_bn
from tests.functional.domains import HEADS, LEVEL_MODULES, ROWS, ReferenceBN, as_images, as_rows, levels
from tests.functional.test_domain_bn import add_domains


def batches() -> list[list[Tensor]]:
    """Of 2, 3 and 1 samples."""
    return [levels(n, seed=n) for n in (2, 3, 1)]


def truth(head: nn.Module, row: int, groups: list[list[list[Tensor]]]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Mean and biased variance of each level's inputs, and of all, for every layer; batches of a group are joint."""
    bn, inputs = ReferenceBN(head, row, 3), {}
    for group in groups:
        for name in LEVEL_MODULES:
            x = [[batch[level] for batch in group] for level in range(3)]
            for inner, m in head.get_submodule(name).conv.named_modules():
                if list(m.children()):
                    continue
                if not isinstance(m, nn.BatchNorm2d):
                    x = [[m(part) for part in level] for level in x]
                    continue
                rows = {d: torch.cat([as_rows(part) for part in level]) for d, level in enumerate(x)}
                for d, kept in enumerate(inputs.setdefault(f"{name}.conv.{inner}", [[], [], []])):
                    kept.append(rows[d])
                sizes = [[len(as_rows(part)) for part in level] for level in x]
                split = {d: y.split(sizes[d]) for d, y in bn(m, rows).items()}
                x = [[as_images(y, part) for y, part in zip(split[d], level, strict=True)] for d, level in enumerate(x)]
    found = {}
    for name, kept in inputs.items():
        each = [torch.cat(rows) for rows in kept]
        found[name] = [(x.mean(0), x.var(0, correction=0)) for x in (*each, torch.cat(each))]
    return found


@pytest.mark.parametrize(
    ("head", "row", "together"),
    [*(("RetinaNet", row, True) for row in ROWS), ("RetinaNet", 2, False), ("RetinaNet", 6, False), ("FCOS", 1, True)],
)
@torch.no_grad()
def test_levels_are_measured_as_they_are_trained(head: Any, row: int, together: bool) -> None:
    head = HEADS[head]()
    handle = add_domains(head, row)
    for layer in find_bn(head).values():
        for p in layer.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    expected = truth(copy.deepcopy(head), row, [batches()] if together else [[b] for b in batches()])
    statistics = precise_bn(
        head, batches(), forward=lambda m, b: m(b), normalization_batch_size="population" if together else "loader"
    )
    assert set(statistics) == set(expected)
    for name, layer in find_bn(head).items():
        *each, whole = expected[name]
        for a, b in zip((layer.running_mean, layer.running_var), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        own = handle.state().get(name)
        assert (own is not None) == (ROWS[row][1] == "domain")
        for level, (mean, var) in enumerate(each if own else ()):
            torch.testing.assert_close(own["domain_mean"][level], mean, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(own["domain_var"][level], var, rtol=1e-9, atol=1e-10)
