"""FrozenBN under DDP: frozen weights and biases cause no error, and ranks stay equal."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bn import freeze_bn
from tests.ranks import run_on_ranks
from tests.zoo import cnn

pytestmark = pytest.mark.ddp


def trained(model: nn.Module, affine: bool) -> list[dict[str, Tensor]]:
    """Weights after two steps before, two during and two after a freeze, each rank with its own data."""
    ddp, found = DistributedDataParallel(model.train()), []
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01, weight_decay=0.1)
    torch.manual_seed(dist.get_rank())
    for phase in ("before", "during", "after"):
        with freeze_bn(model, affine=affine) if phase == "during" else contextlib.nullcontext():
            for _ in range(2):
                optimizer.zero_grad()
                ddp(torch.randn(6, 3, 8, 8) + dist.get_rank()).square().mean().backward()
                optimizer.step()
        found.append(copy.deepcopy(dict(model.named_parameters())))
    return found


@pytest.mark.parametrize("affine", [True, False])
def test_ranks_train_and_stay_equal_with_and_without_affine(affine: bool) -> None:
    results = run_on_ranks(trained, 2, cnn(), affine)
    for on_rank_0, on_rank_1 in zip(*results, strict=True):
        assert all(torch.equal(on_rank_1[key], value) for key, value in on_rank_0.items())
    before, during, after = results[0]
    for key in before:
        assert torch.equal(before[key], during[key]) is (affine and key[0] in "15"), key
        assert not torch.equal(during[key], after[key]), key
