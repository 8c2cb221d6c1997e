"""SyncBN on several ranks is one process on all their batches: outputs, gradients, running statistics, to 1e-10."""

import contextlib
import copy
from collections.abc import Callable
from itertools import chain, product

import pytest
import timm.layers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bn import find_bn, freeze_bn, precise_bn, sync_bn
from lightning_bn.functional.sync import Synced
from lightning_bn.layers.behavior import behaviors_of
from tests.ranks import run_on_ranks
from tests.zoo import cnn, images

pytestmark = pytest.mark.ddp
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Case = tuple[nn.Module, list[list[Tensor]]]
"""Model, and the batches of each rank."""
Outcome = tuple[list[Tensor], list[Tensor], dict[str, Tensor]]
"""Outputs and input gradients of all batches; gradients of the parameters; buffers."""


def network(bn: Callable[[int], nn.Module]) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn(4), nn.ReLU(), nn.Conv2d(4, 2, 3), bn(2)).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return model


def without_bias(channels: int) -> nn.Module:
    bn = nn.BatchNorm2d(channels)
    bn.bias = None
    return bn


class Twice(nn.Module):
    """One BatchNorm called on two feature maps of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.conv(x[..., ::2, ::2]) + 1).mean((2, 3), keepdim=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: network(nn.BatchNorm2d),
    "channels_last": lambda: network(nn.BatchNorm2d).to(memory_format=torch.channels_last),
    "BatchNormAct2d": lambda: network(timm.layers.BatchNormAct2d),
    "no affine": lambda: network(lambda n: nn.BatchNorm2d(n, affine=False)),
    "no bias": lambda: network(without_bias),
    "momentum None": lambda: network(lambda n: nn.BatchNorm2d(n, momentum=None)),
    "no statistics": lambda: network(lambda n: nn.BatchNorm2d(n, track_running_stats=False)),
    "called twice": lambda: Twice().double(),
    "rows": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)).double(),
    "on the input": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).double(),
}
SIZES = {2: [(5, 2), (4, 0), (1, 1)], 4: [(3, 1, 2, 4), (0, 3, 0, 2)]}


def steps(model: nn.Module, batches: list[Tensor], input_grads: bool = True) -> Outcome:
    """Two passes over the batches, with a loss that is a sum over samples: over none it is 0, and has a history."""
    seen = []
    for x in batches * 2:
        x = x.clone().requires_grad_(input_grads)
        output = model(x)
        rest = output.shape[1:]
        (output.square() * torch.linspace(0.5, 2, rest.numel(), device=x.device).view(rest)).sum().backward()
        seen += [output.detach().cpu(), gradient_of(x)]
    buffers = {name: buffer.cpu().clone() for name, buffer in model.named_buffers()}
    return seen, [gradient_of(p) for p in model.parameters()], buffers


def gradient_of(x: Tensor) -> Tensor:
    """On the CPU; on CUDA a rank without rows leaves it away, which stands for zeros."""
    return torch.zeros_like(x, device="cpu") if x.grad is None else x.grad.cpu().clone()


def steps_on_this_rank(cases: list[Case], device: str) -> list[Outcome]:
    found = []
    for model, shards in cases:
        with sync_bn(model.to(device)):
            (behavior,) = {b for layer in find_bn(model).values() for b in behaviors_of(layer)}
            assert isinstance(behavior, Synced) and behavior.world_size == dist.get_world_size()
            found.append(steps(model, [x.to(device) for x in shards[dist.get_rank()]]))
        assert not any(behaviors_of(layer) for layer in find_bn(model).values())
    return found


def assert_one_batch(model: nn.Module, shards: list[list[Tensor]], found: list[Outcome]) -> None:
    """What the ranks found is what one process finds on their batches as one; and identical where it should be."""
    together = [torch.cat(batches) for batches in zip(*shards, strict=True)]
    seen, grads, buffers = steps(model, together)
    close = {"rtol": 1e-10, "atol": 1e-10}
    outputs, shares, states = zip(*found, strict=True)
    for *parts, whole in zip(*outputs, seen, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, **close)
    for *parts, whole in zip(*shares, grads, strict=True):
        torch.testing.assert_close(sum(parts), whole, **close)
    for stored in states:
        for name, value in buffers.items():
            torch.testing.assert_close(stored[name], value, **close)
            assert torch.equal(stored[name], states[0][name]), "identical bits on every rank"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_are_one_process_on_their_batches_as_one(world_size: int, device: str) -> None:
    cases: list[Case] = []
    for name, sizes in product(MODELS, SIZES[world_size]):
        batches = [x.double() for x in images(sum(sizes), sum(sizes))]
        shards = [list(parts) for parts in zip(*(x.split(sizes) for x in batches), strict=True)]
        cases.append((MODELS[name](), shards))
    results = run_on_ranks(steps_on_this_rank, world_size, cases, device)
    for (model, shards), *found in zip(cases, *results, strict=True):
        assert_one_batch(model, shards, found)


def penalties(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """A step with a gradient penalty (WGAN-GP) on each batch: gradients of inputs and parameters."""
    found = []
    for x in batches:
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        loss = (grad.flatten(1).norm(dim=1) - 1).square().sum() + model(x).square().sum()
        found.append(torch.autograd.grad(loss, x, retain_graph=True)[0].cpu())
        loss.backward()
    return [*found, *(gradient_of(p) for p in model.parameters())]


def penalties_on_this_rank(cases: list[Case], device: str) -> list[list[Tensor]]:
    found = []
    for model, shards in cases:
        with sync_bn(model.to(device)):
            found.append(penalties(model, [x.to(device) for x in shards[dist.get_rank()]]))
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_a_gradient_penalty_is_that_of_one_process(device: str) -> None:
    cases: list[Case] = []
    for name, sizes in product(MODELS, ((5, 2), (4, 0))):
        (x,) = images(sum(sizes))
        cases.append((MODELS[name](), [[part] for part in x.double().split(sizes)]))
    results = run_on_ranks(penalties_on_this_rank, 2, cases, device)
    for (model, shards), *found in zip(cases, *results, strict=True):
        whole = penalties(model, [torch.cat([x for (x,) in shards])])
        torch.testing.assert_close(torch.cat([of_rank[0] for of_rank in found]), whole[0], rtol=1e-8, atol=1e-10)
        for *shares, expected in zip(*(of_rank[1:] for of_rank in found), whole[1:], strict=True):
            torch.testing.assert_close(sum(shares), expected, rtol=1e-8, atol=1e-10)


def groups(model: nn.Module, shards: list[list[Tensor]]) -> Outcome:
    """Steps in groups of two, which are reused and, when no layer needs them, destroyed."""
    made = dist.distributed_c10d._world.pg_names
    there_were = len(made)
    second = copy.deepcopy(model)
    with pytest.raises(ValueError, match="group_size=3, but there are 4 ranks"):
        sync_bn(model, group_size=3)
    with sync_bn(model, group_size=2, layers="1"):
        with_one = len(made)
        with sync_bn(model, group_size=2, layers="4"), sync_bn(second, group_size=4):
            assert len(made) == with_one == there_were + 1
            outcome = steps(model, shards[dist.get_rank()])
        steps(model, shards[dist.get_rank()])  # layer 1 is synced still
    assert len(made) == there_were
    with pytest.warns(UserWarning, match="Ghost BN") if dist.get_rank() == 0 else contextlib.nullcontext():
        sync_bn(model, group_size=1)
    with sync_bn(model), pytest.raises(ValueError, match="'1' already has SyncBN"):
        sync_bn(model, group_size=2)
    return outcome


def test_groups_of_two_out_of_four_are_two_processes() -> None:
    model = MODELS["BatchNorm2d"]()
    shards = [[part] for part in images(10)[0].double().split((3, 1, 0, 6))]
    results = run_on_ranks(groups, 4, model, shards)
    for pair in (slice(0, 2), slice(2, 4)):
        assert_one_batch(copy.deepcopy(model), shards[pair], results[pair])


def ddp_gradients(model: nn.Module, uneven: list[list[Tensor]]) -> list[list[Tensor]]:
    found = []
    for shards in uneven:
        ddp = DistributedDataParallel(copy.deepcopy(model))
        with sync_bn(ddp):
            found.append(steps(ddp, [shards[dist.get_rank()]], input_grads=False)[1])
    return found


def test_under_ddp_gradients_are_those_of_one_process_averaged_over_ranks() -> None:
    model, x = MODELS["BatchNormAct2d"](), images(7)[0].double()
    results = run_on_ranks(ddp_gradients, 2, model, [list(x.split(sizes)) for sizes in ((5, 2), (7, 0))])
    _, expected, _ = steps(model, [x], input_grads=False)
    for found in chain(*results):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours * 2, theirs, rtol=1e-10, atol=1e-10)


def uneven(x: Tensor) -> Tensor | None:
    """What only one rank does, or each differently; a rank that waited for another would fail the test."""
    rank, bn = dist.get_rank(), nn.BatchNorm1d(3).double()
    with sync_bn(bn):
        # rank 1 has no rows, of another type; and its loss ignores the output
        own = x.clone().requires_grad_() if rank == 0 else torch.zeros(0, 3)
        output = bn(own)
        (output.pow(3).sum() if rank == 0 else 0 * output.sum()).backward()
        with torch.no_grad():
            bn(x)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            bn(x[:1] if rank == 0 else x[:0])
        stored = bn.running_mean.clone()
        bn(x[:0])
        assert torch.equal(bn.running_mean, stored)
        bn.eval()
        if rank == 0:
            bn(x)
        bn.train()
        with freeze_bn(bn):
            if rank == 0:
                bn(x)
    with freeze_bn(bn), sync_bn(bn):
        if rank == 1:
            bn(x)
    if rank == 0:
        bn(x)  # undone
    return own.grad


def test_ranks_wait_for_each_other_only_where_layers_are_synced_and_in_train_mode() -> None:
    x = (torch.randn(6, 3, dtype=torch.float64) * 3 + 1).requires_grad_()
    first, second = run_on_ranks(uneven, 2, x.detach())
    nn.BatchNorm1d(3).double()(x).pow(3).sum().backward()
    torch.testing.assert_close(first, x.grad, rtol=1e-10, atol=1e-10)
    assert second is None


def estimated(model: nn.Module, shards: list[list[Tensor]]) -> None:
    """On ranks with different numbers of batches, synced layers get the statistics of plain ones."""
    plain = copy.deepcopy(model)
    precise_bn(plain, shards[dist.get_rank()], normalization_batch_size="loader")
    with sync_bn(model):
        precise_bn(model, shards[dist.get_rank()], normalization_batch_size="loader")
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_pass_over_data_neither_waits_nor_syncs() -> None:
    run_on_ranks(estimated, 2, cnn(), [images(8, 5, 3), []])
