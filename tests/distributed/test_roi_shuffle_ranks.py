"""Modules whose rows change ranks: their inputs, outputs and gradients, and that no rank waits forever."""

import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_bn import domain_bn, find_bn, freeze_bn, ghost_bn, precise_bn, roi_shuffle
from lightning_bn.layers.behavior import behaviors_of
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.ddp
State = dict[str, Tensor]


class Detector(nn.Module):
    """A trunk, and two heads with BatchNorm or without, each of which returns a structure."""

    def __init__(self, bn: bool = True, checkpointing: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trunk = nn.Linear(4, 6)
            self.box_head, self.mask_head = (Head(bn) for _ in range(2))
        self.checkpointing = checkpointing
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        if "whole" in self.checkpointing:
            _, boxes, _, masks = self.run(self.heads, features)
        else:
            _, boxes = self.run(self.box_head, features)
            _, masks = self.run(self.mask_head, features[: len(x) // 2])
        return {"trunk": features.square().sum(), "boxes": boxes.pow(3).sum(), "masks": masks.sin().sum()}

    def heads(self, features: Tensor) -> tuple[Any, ...]:
        features = features * 2  # not what the region was given
        self.box_head(features)
        return *self.box_head(features.cos()), *self.mask_head(features[: len(features) // 2])

    def run(self, function: Callable[..., Any], x: Tensor) -> Any:
        if not self.checkpointing:
            return self.heads(x) if function == self.heads else function(x)
        return checkpoint(function, x, use_reentrant="reentrant" in self.checkpointing)


class Head(nn.Module):
    """Not the same for two rows, unless they are the same."""

    def __init__(self, bn: bool) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 5), nn.BatchNorm1d(5) if bn else nn.Identity()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[str, Tensor]:
        self.seen.append(x.detach())
        return "rows", self.bn(self.fc(x)).relu_()


def rows(count: int) -> Tensor:
    own = torch.Generator().manual_seed(100 * dist.get_rank() + count)
    return torch.randn(count, 4, dtype=torch.float64, generator=own) + dist.get_rank()


def shuffled(model: nn.Module, seed: int = 0) -> Any:
    return roi_shuffle(model, modules="*_head", generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> State:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, x: Tensor, uses: tuple[str, ...] = ("trunk", "boxes", "masks"), **options: Any) -> State:
    """Gradients over both ranks of a loss that uses some of the outputs."""
    ddp = DistributedDataParallel(model, **options)
    outputs = ddp(x)
    torch.stack([outputs[name] for name in uses]).sum().backward()
    return gradients(model)


def assert_equal(found: State, expected: State, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def without_batchnorm_gradients_are_those_of_no_shuffle() -> None:
    for counts in ((0, 9), (12, 1), (1, 1)):
        x, model = rows(counts[dist.get_rank()]), Detector(bn=False)
        without = step(copy.deepcopy(model), x)
        with pytest.warns(UserWarning, match="no BatchNorm") if dist.get_rank() == 0 else contextlib.nullcontext():
            handle = shuffled(model)
        with handle:
            assert_equal(step(model, x), without)
            assert handle.unshuffled == (2 if sum(counts) < 4 else 0)


def what_a_head_sees() -> tuple[Tensor, Tensor, dict[str, Tensor], list[str]]:
    model = Detector()
    x = rows(9)
    with shuffled(model):
        outputs = model(x)
        reprs = [repr(model)]
        model.eval()
        model(x)
    reprs.append(repr(model))
    moved, in_eval = model.box_head.seen
    features = model.trunk(x).detach()
    assert torch.equal(in_eval, features), "rows moved in eval mode"
    assert all(o.requires_grad for o in outputs.values())
    return features, moved, dict(model.box_head.bn.named_buffers()), reprs


def test_a_head_normalizes_rows_of_both_ranks() -> None:
    first, second = run_on_ranks(what_a_head_sees, 2)
    every = torch.cat([first[0], second[0]])
    for own, moved, buffers, reprs in (first, second):
        from_here = sum(any(torch.equal(row, o) for o in own) for row in moved)
        assert 0 < from_here < len(moved) == 9, "rows of one rank alone"
        normalized = nn.functional.linear(moved, Detector().box_head.fc.weight, Detector().box_head.fc.bias)
        torch.testing.assert_close(buffers["running_mean"], 0.1 * normalized.mean(0))
        assert reprs[0].count("rows exchanged") == 2 and "exchanged" not in reprs[1]
    moved = torch.cat([first[1], second[1]])
    assert torch.equal(moved.sort(0)[0], every.sort(0)[0])


EVERY_OUTPUT = ("trunk", "boxes", "masks")
USES: list[tuple[tuple[int, int], list[tuple[str, ...]], bool]] = [
    ((8, 6), [EVERY_OUTPUT, ("trunk",)], False),
    ((0, 11), [EVERY_OUTPUT, ("trunk",)], True),
    ((0, 11), [("trunk",), ("masks", "boxes")], False),
    ((8, 6), [("trunk", "masks"), ("boxes",)], True),
    ((8, 6), [("boxes", "masks", "trunk"), EVERY_OUTPUT], False),
]
"""Rows of each rank, outputs that its loss uses, and find_unused_parameters."""


def a_rank_whose_loss_ignores_its_rows_runs_the_backward_of_the_others() -> None:
    """It gets the gradients that it gets from 0 times the outputs that it does not use."""
    rank = dist.get_rank()
    for seed, (counts, uses, find_unused) in itertools.product(range(2), USES):
        x, model = rows(counts[rank]), Detector()
        twin = copy.deepcopy(model)
        with shuffled(model, seed):
            found = step(model, x, uses[rank], find_unused_parameters=find_unused)
        ddp = DistributedDataParallel(twin)
        with shuffled(ddp.module, seed):
            sum((name in uses[rank]) * value for name, value in ddp(x).items()).backward()
        assert_equal(found, gradients(twin))


class WithoutGradients(Detector):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        with torch.set_grad_enabled(dist.get_rank() == 0):
            boxes = self.box_head(features)[1].sin().sum()
        return {"trunk": features.square().sum(), "boxes": boxes}


class CallsItself(Detector):
    def forward(self, x: Tensor, within: bool = False) -> dict[str, Tensor]:
        if within:
            return super().forward(x)
        return {**self(x, within=True), "boxes": self.box_head(self.trunk(x))[1].sin().sum()}


def no_rank_waits_for_one_without_gradients_or_after_a_call_within_a_call() -> None:
    for kind in (WithoutGradients, CallsItself):
        model = kind()
        with shuffled(model):
            outputs = model(rows(6))
            (outputs["trunk"] + (0 if dist.get_rank() else outputs["boxes"])).backward()
        assert gradients(model)["trunk.weight"].isfinite().all()


def recomputed_rows_take_the_route_they_took() -> None:
    """In two forwards with checkpointing and without; and for the same rows once more, in another order."""
    x = rows(5 + dist.get_rank())
    for checkpointing in ("head", "head, reentrant", "whole", "whole, reentrant"):
        found = []
        for kind in (checkpointing, "whole" if "whole" in checkpointing else ""):
            model = Detector(checkpointing=kind)
            if kind == "whole":
                model.run = lambda function, x: function(x)  # type: ignore[method-assign]
            with shuffled(model):
                for _ in range(2):
                    model.zero_grad()
                    outputs = [model(x), model(x + 1)]
                    sum(value for output in outputs for value in output.values()).backward()
            found.append(gradients(model))
        assert_equal(*found)


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder_q, self.encoder_k = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2))
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            keys = self.encoder_k(x)
        return (self.encoder_q(x) * keys).sum(), keys


def a_momentum_encoder_is_shuffled_without_gradients() -> None:
    """Rank 1 runs no backward, for which no rank waits."""
    model, x = Contrastive(), rows(6)
    with roi_shuffle(model, modules="encoder_k"):
        loss, keys = model(x)
        if dist.get_rank() == 0:
            loss.backward()
    assert keys.shape == (6, 3) and not keys.requires_grad and not torch.allclose(keys, model.encoder_k(x))


def ranks_wait_for_each_other_only_where_batch_statistics_are_used() -> None:
    """Each rank does it a different number of times."""
    model, x = Detector(), rows(6)
    with shuffled(model):
        precise_bn(model, [x] * (1 + dist.get_rank()), normalization_batch_size="loader")
        precise_bn(model, [x] * (1 + dist.get_rank()), layers="box_head.*", normalization_batch_size="loader")
        model.eval()
        for _ in range(dist.get_rank()):
            model(x)
        model.train()
        with freeze_bn(model):
            for _ in range(dist.get_rank()):
                model(x)["boxes"].backward()
        for layer in find_bn(model).values():
            layer.eval()
        for _ in range(dist.get_rank()):
            model(x)
    assert torch.equal(model.box_head.seen[-1], model.trunk(x)) or dist.get_rank() == 0
    for _ in range(dist.get_rank()):
        model.train()(x)  # undone


def copies_are_plain_and_nothing_is_left() -> None:
    made = dist.distributed_c10d._world.pg_names
    there_were = len(made)
    model = Detector()
    plain = copy.deepcopy(model)
    with shuffled(model), ghost_bn(model, size=3):
        assert len(made) == there_were + 1
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
            assert not any(behaviors_of(m) for m in twin.modules())
            assert [sorted(vars(m)) for m in twin.modules()] == [sorted(vars(m)) for m in plain.modules()]
            if dist.get_rank():
                twin(rows(4))  # alone: it is a plain one
        assert list(model.state_dict()) == list(plain.state_dict())
        with pytest.raises(ValueError, match=r"'box_head\.bn' already has RoIShuffle"):
            roi_shuffle(model, modules="*bn")
    assert len(made) == there_were, "the group is left"
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def compiled_gradients_are_the_eager_ones() -> None:
    """Where rank 1's loss ignores the heads."""
    x, found = rows(6), []
    for wrap in (torch.nn.Sequential, lambda model: torch.compile(model, backend="eager")):
        model = Detector()
        called = wrap(model)
        with shuffled(called):
            outputs = called(x)
            (outputs["trunk"] if dist.get_rank() else sum(outputs.values())).backward()
        if dist.get_rank():
            called(x)  # alone: undone
        found.append(gradients(model))
    assert_equal(*found)


class Strange(Detector):
    """Its head is given, or returns, what cannot be exchanged."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap
        self.box_head.forward = lambda x: x.sum() if isinstance(x, Tensor) else x  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.box_head(self.wrap(x))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Sequential(nn.BatchNorm1d(3)), nn.BatchNorm1d(3)])


def what_cannot_be_exchanged_or_recomputed_and_layers_of_datasets_are_refused() -> None:
    for wrap, words in [
        (lambda x: {"x": x, "where": slice(None)}, "exchange_rows was given a slice"),
        (Tensor.double, "restore_rows was given a Tensor that is no tensor of rows"),
    ]:
        model = Strange(wrap)
        with shuffled(model), pytest.raises(TypeError, match=f"Module 'box_head': {words}"):
            model(rows(5))
    model, calls = Detector(checkpointing="whole"), itertools.count()
    heads = model.heads
    model.heads = lambda features: heads(features + next(calls))  # type: ignore[method-assign]
    with shuffled(model):
        loss = sum(model(rows(6)).values())
        with pytest.raises(RuntimeError, match="Activation checkpointing has to recompute the same numbers"):
            loss.backward()
    heads = Heads()
    refusal = pytest.raises(
        ValueError, match=r"cannot have domain-specific BN, because it has RoIShuffle: rows .* domain"
    )
    with roi_shuffle(heads, modules="heads.*"), refusal:
        domain_bn(heads, num_domains=2, train_statistics="domain", population_statistics="domain", affine="shared")


@pytest.mark.parametrize(
    "check",
    [
        without_batchnorm_gradients_are_those_of_no_shuffle,
        a_rank_whose_loss_ignores_its_rows_runs_the_backward_of_the_others,
        no_rank_waits_for_one_without_gradients_or_after_a_call_within_a_call,
        recomputed_rows_take_the_route_they_took,
        a_momentum_encoder_is_shuffled_without_gradients,
        ranks_wait_for_each_other_only_where_batch_statistics_are_used,
        copies_are_plain_and_nothing_is_left,
        compiled_gradients_are_the_eager_ones,
        what_cannot_be_exchanged_or_recomputed_and_layers_of_datasets_are_refused,
    ],
)
def test_on_two_ranks(check: Callable[[], None]) -> None:
    run_on_ranks(check, 2)


def test_one_process_is_warned_and_keeps_its_modules() -> None:
    model = Detector()
    with pytest.warns(UserWarning, match="one process.*Ghost BN") as record, roi_shuffle(model, modules="*head"):
        assert type(model.box_head) is Head and type(model) is Detector
    assert len(record) == 1
    with pytest.warns(UserWarning, match="there is one process"), roi_shuffle(Heads(), modules="heads.*"):
        pass


CONTAINER = r"'heads' is a ModuleList, .*select its members \(modules='heads\.\*'\)"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"modules": "roi.*"}, ValueError, r"modules='roi.\*' matches no module of Heads. There are: heads"),
        *[({"modules": m}, TypeError, "modules must be a glob pattern over qualified") for m in (3, None, "", ())],
        *[({"modules": modules}, ValueError, CONTAINER) for modules in ("heads", "heads*")],
        ({"modules": "heads.0", "generator": 0}, TypeError, "generator must be"),
    ],
)
def test_what_is_no_module_or_generator_is_refused(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        roi_shuffle(Heads(), **options)
