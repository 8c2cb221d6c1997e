"""precise_bn on layers with domains: each domain's statistics, and all together, against float64 by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import find_bn, precise_bn
from tests.functional.domains import HEADS, LEVEL_MODULES, ROWS, levels
from tests.functional.test_domain_bn import add_domains


def batches() -> list[list[Tensor]]:
    """Of 2, 3 and 1 samples."""
    return [levels(n, seed=n) for n in (2, 3, 1)]


def truth(head: nn.Module, row: int, shown: list[list[list[Tensor]]]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Mean and biased variance of each level's inputs, and of all, of every layer, level by level and by hand.

    ``shown`` are groups of batches that are normalized together.
    """
    inputs: dict[str, list[list[Tensor]]] = {}
    for group in shown:
        for owner in LEVEL_MODULES:
            tower = head.get_submodule(owner).conv
            now = [[batch[level] for batch in group] for level in range(3)]
            for within, module in tower.named_modules():
                if list(module.children()):
                    continue
                if not isinstance(module, nn.BatchNorm2d):
                    now = [[module(x) for x in xs] for xs in now]
                    continue
                rows = [[x.movedim(1, -1).flatten(0, -2) for x in xs] for xs in now]
                kept = inputs.setdefault(f"{owner}.conv.{within}", [[], [], []])
                for level, own in enumerate(rows):
                    kept[level] += own
                joint = torch.cat([r for own in rows for r in own])
                out = []
                for level, xs in enumerate(now):
                    own = joint if ROWS[row][0] == "shared" else torch.cat(rows[level])
                    mean, var = own.mean(0), own.var(0, correction=0)
                    scale = module.weight if ROWS[row][2] == "shared" else module.domain_weight[level]
                    shift = module.bias if ROWS[row][2] == "shared" else module.domain_bias[level]
                    out.append(
                        [
                            ((x.movedim(1, -1) - mean) / (var + module.eps).sqrt() * scale + shift).movedim(-1, 1)
                            for x in xs
                        ]
                    )
                now = out
    found = {}
    for name, kept in inputs.items():
        each = [torch.cat(xs) for xs in kept]
        found[name] = [(r.mean(0), r.var(0, correction=0)) for r in (*each, torch.cat(each))]
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
    expected = truth(copy.deepcopy(head).eval(), row, [batches()] if together else [[b] for b in batches()])
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
