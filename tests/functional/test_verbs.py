"""What all verbs have in common: what an undo leaves, what untracked calls move, what a deep copy computes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm.layers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import (
    adapt_bn,
    domain_bn,
    find_bn,
    freeze_bn,
    ghost_bn,
    mini_batch_inference,
    roi_shuffle,
    sync_bn,
)
from lightning_bn.functional.domain.tensors import STATISTICS
from lightning_bn.functional.sync import Synced
from lightning_bn.layers.behavior import Handle
from tests.functional.domains import EVERY, choices
from tests.zoo import images


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    """A process group of one rank, in which everything is computed as over several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SideBySide(nn.Module):
    """Layers of several kinds that are all given the same, whatever the others do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.BatchNorm2d(3),
                nn.BatchNorm2d(3, momentum=None),
                nn.BatchNorm2d(3, momentum=0.0),
                timm.layers.BatchNormAct2d(3),
            ]
        )
        self.layers[0].register_forward_hook(lambda *_: None)
        self.layers[1].mine = "the user's"
        for layer in self.layers:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
        self.layers[2].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def net() -> SideBySide:
    torch.manual_seed(0)
    return SideBySide().double().train()


BATCHES = [x.double() for x in images(8, 7, 5, 8, pixels=4)]
Verb = Callable[[nn.Module], Any]


def domains(row: int, samples: bool) -> Verb:
    """A row of Table 5, shown samples of several domains or batches of one."""

    def verb(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = domain_bn(model, num_domains=2, **choices(row))
        if not samples:
            handle.set_domain(1)
        else:  # whatever the batch: the first two samples are of one domain
            model.register_forward_pre_hook(lambda m, args: handle.set_domain((torch.arange(len(args[0])) > 1).long()))
            handle._undo.insert(0, model._forward_pre_hooks.clear)
        return handle

    return verb


def synced(model: nn.Module) -> Handle:
    """What sync_bn does, past its refusal to do it for one rank."""
    layers = find_bn(model)
    return Handle(layers.values(), Synced(layers, None))


TRAINING: dict[str, Verb] = {
    "ghost_bn": lambda m: ghost_bn(m, size=3),
    "ghost_bn, contiguous": lambda m: ghost_bn(m, splits=2, grouping="contiguous"),
    "sync_bn": synced,
    "mini_batch_inference": mini_batch_inference,
    "roi_shuffle": lambda m: roi_shuffle(m, modules="layers.*"),
    **{f"domain_bn, row {row}": domains(row, samples=False) for row in EVERY},
    **{f"domain_bn of samples, row {row}": domains(row, samples=True) for row in EVERY},
}
"""Under which training moves the running statistics that plain layers have."""
WITH_AFFINE = [name for name in TRAINING if "domain_bn" in name and EVERY[int(name[-1])][2] == "domain"]
"""Under which the state dict has the affine of domains as well."""
CONSTANT: dict[str, Verb] = {
    "freeze_bn": freeze_bn,
    "freeze_bn, affine": lambda m: freeze_bn(m, affine=True),
    "adapt_bn": lambda m: adapt_bn(m, BATCHES[:2], prior_samples=3),
}
"""Under which training moves none, or what it moved is undone."""
VERBS = TRAINING | CONSTANT


def given(name: str, model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*changes nothing")
        return VERBS[name](model)


def left(model: nn.Module) -> list[Any]:
    """Everything that a model is, but for the values of its tensors."""
    return [
        (
            type(m),
            repr(m),
            {key: items(value) for key, value in vars(m).items()},
            [p.requires_grad for p in m.parameters(recurse=False)],
        )
        for m in model.modules()
    ]


def items(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: id(item) for key, item in value.items()}
    return set(value) if isinstance(value, set) else value


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def train(model: nn.Module) -> None:
    """Train and evaluate; in 24 forwards, so that a counter that was not put back shows with momentum=None."""
    for x in BATCHES * 3:
        model.train()(x).square().mean().backward()
        model.eval()(x)
    model.train().zero_grad()


@pytest.mark.parametrize("name", VERBS)
def test_undo_leaves_everything_as_it_was_and_the_running_statistics_of_training(name: str) -> None:
    model, plain = net(), net()
    before, stored = left(model), state(model)
    handle = given(name, model)
    assert list(model.state_dict()) == list(stored) or name in WITH_AFFINE
    train(model)
    handle.undo()
    assert left(model) == before
    if name in CONSTANT:
        assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())
    else:
        train(plain)
        torch.testing.assert_close(state(model), state(plain), rtol=1e-10, atol=1e-10)


@contextmanager
def setting(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of all layers, for a while, as losses like VAT's and GANs' steps set it."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    before = [getattr(layer, name) for layer in layers]
    for layer in layers:
        setattr(layer, name, value)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            setattr(layer, name, own)


def step(model: nn.Module, x: Tensor, name: str, value: Any) -> None:
    model(x)
    with setting(model, name, value):
        model(x + 6)


TOGGLES = [("track_running_stats", False), ("momentum", 0.0), ("training", False)]


@pytest.mark.parametrize(("attribute", "value"), TOGGLES)
@pytest.mark.parametrize("name", TRAINING | {"freeze_bn": freeze_bn})
def test_an_untracked_call_moves_what_it_moves_in_plain_layers(name: str, attribute: str, value: Any) -> None:
    model, plain = net(), net()
    stored = state(model)
    with given(name, model) as handle:
        for x in BATCHES:
            step(model, x, attribute, value)
        of_domains = handle.state() if "domain_bn" in name else {}
    for x in BATCHES:
        step(plain, x, attribute, value)
    expected = stored if name == "freeze_bn" else state(plain)
    torch.testing.assert_close(state(model), expected, rtol=1e-10, atol=1e-10)
    if not of_domains:
        return
    for domain, rows in enumerate((slice(2), slice(2, None)) if "samples" in name else (slice(0), slice(None))):
        plain = net()
        for x in BATCHES:
            if len(x[rows]):
                step(plain, x[rows], attribute, value)
        for layer, own in of_domains.items():
            for key, stored in zip(STATISTICS, plain.get_submodule(layer).buffers(), strict=True):
                torch.testing.assert_close(own[key][domain], stored.cpu(), rtol=1e-10, atol=1e-10)


EVALUATE_OTHERWISE = {
    **{n: "domain_bn" for n in VERBS if "domain_bn" in n and "domain" in EVERY[int(n[-1])][1:]},
    "mini_batch_inference": "mini_batch_inference",
}
"""Verb -> what the warning names, where a plain copy evaluates otherwise."""


@pytest.mark.parametrize("name", VERBS)
def test_a_deep_copy_evaluates_as_the_model_does_or_says_that_it_does_not(name: str) -> None:
    model, (x, *_) = net(), BATCHES
    with given(name, model) as handle:
        if "domain_bn" in name:
            with handle.use_domain(0):
                model(x + 5)
        for batch in BATCHES:
            model(batch)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pickle.loads(pickle.dumps(model.layers[3]))  # says nothing
            twin = copy.deepcopy(model)
        assert [EVALUATE_OTHERWISE[name] in str(w.message) for w in said] == [True] * (name in EVALUATE_OTHERWISE)
        expected = model.eval()(x)
        assert torch.equal(twin.eval()(x), expected) == (name not in EVALUATE_OTHERWISE)
        if "sample" not in name and "roi" not in name and "adapt" not in name and "sync" not in name:
            with given(name, twin):  # what the warning advises
                assert torch.equal(twin.eval()(x), expected)


@pytest.mark.parametrize("row", EVERY)
def test_domains_given_to_a_copy_go_on_as_in_the_model_and_leave_a_plain_copy(row: int) -> None:
    model = net()
    handle = domains(row, samples=False)(model)
    train(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = copy.deepcopy(model)
    its = domains(row, samples=False)(twin)
    torch.testing.assert_close(its.state(affine=True), handle.state(affine=True), rtol=0, atol=0)
    train(model)
    train(twin)
    torch.testing.assert_close(state(twin), state(model), rtol=0, atol=0)
    torch.testing.assert_close(its.state(affine=True), handle.state(affine=True), rtol=0, atol=0)
    its.undo()
    assert list(twin.state_dict()) == list(net().state_dict())
    assert [b.shape for b in twin.buffers()] == [b.shape for b in net().buffers()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in net().parameters()]


def test_a_copy_of_domains_takes_other_domains_and_other_verbs_as_a_plain_model() -> None:
    model = net()
    domains(6, samples=False)(model)
    model(BATCHES[0])
    with pytest.warns(UserWarning, match="deep copy of a model under domain_bn"):
        twin = copy.deepcopy(model)
    with adapt_bn(twin, BATCHES):
        pass
    with domain_bn(twin, num_domains=3, **choices(6)) as handle:
        for layer, own in handle.state(affine=True).items():
            assert torch.equal(own["domain_mean"], twin.get_submodule(layer).running_mean.expand(3, -1))
            assert torch.equal(own["domain_weight"], twin.get_submodule(layer).weight.expand(3, -1))
    with pytest.warns(UserWarning, match="deep copy"):
        twin = copy.deepcopy(model)
    with domain_bn(twin, num_domains=2, **choices(4)) as handle, handle.use_domain(0):
        twin(BATCHES[0]).sum().backward()
        assert twin.layers[0].weight.grad is not None and "layers.0.domain_weight" not in twin.state_dict()


def test_a_layer_that_holds_itself_is_copied_once() -> None:
    """As one does by a hook that is a method of its own."""
    model = net()
    layer = model.layers[0]
    layer.itself = [layer]
    with ghost_bn(model, size=2):
        twin = copy.deepcopy(model).layers[0]
    assert twin.itself[0] is twin and type(twin) is nn.BatchNorm2d


STRANGE: list[tuple[Verb, str]] = [
    (lambda m: adapt_bn(m, BATCHES, layers=3), "layers"),  # type: ignore[arg-type]
    (lambda m: adapt_bn(m, BATCHES, prior_samples="2"), "prior_samples"),  # type: ignore[arg-type]
    (lambda m: adapt_bn(m, BATCHES, num_samples=2.5), "num_samples"),  # type: ignore[arg-type]
    (lambda m: adapt_bn(m, BATCHES, progress="no"), "progress"),  # type: ignore[arg-type]
    (lambda m: adapt_bn(m, BATCHES, forward="forward"), "forward"),  # type: ignore[arg-type]
    (lambda m: adapt_bn(m, BATCHES, batch_size_fn=3), "batch_size_fn"),  # type: ignore[arg-type]
    (lambda m: sync_bn(m, layers=3), "layers"),  # type: ignore[arg-type]
    (lambda m: sync_bn(m, group_size="2"), "group_size"),  # type: ignore[arg-type]
    (lambda m: ghost_bn(m, size=2, layers=3), "layers"),  # type: ignore[arg-type]
    (lambda m: ghost_bn(m, size="2"), "size"),  # type: ignore[arg-type]
    (lambda m: ghost_bn(m, splits=True), "splits"),
    (lambda m: ghost_bn(m, size=2, grouping="interleave"), "grouping"),  # type: ignore[arg-type]
    (lambda m: ghost_bn(m, size=2, grouping=["contiguous"]), "grouping"),  # type: ignore[arg-type]
    (lambda m: domain_bn(m, num_domains="2", **choices(4)), "domains"),  # type: ignore[arg-type]
    (lambda m: domain_bn(m, num_domains=2, **choices(4), layers=3), "layers"),  # type: ignore[arg-type]
    (lambda m: domain_bn(m, num_domains=2, **choices(4), level_modules=3), "level_modules"),  # type: ignore[arg-type]
    *(
        (lambda m, name=name, bad=bad: domain_bn(m, num_domains=2, **choices(4) | {name: bad}), name)
        for name in ("train_statistics", "population_statistics", "affine")
        for bad in ("domains", True, ["domain"], torch.ones(2))
    ),
    (lambda m: freeze_bn(m, layers=3), "layers"),  # type: ignore[arg-type]
    (lambda m: mini_batch_inference(m, layers=3), "layers"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "argument"), STRANGE)
def test_a_strange_argument_is_refused_by_name_at_the_call(call: Verb, argument: str) -> None:
    model = net()
    before, stored = left(model), state(model)
    with pytest.raises((TypeError, ValueError), match=argument):
        call(model)
    assert left(model) == before and all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
