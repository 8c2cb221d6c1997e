"""What all verbs have in common: what an undo leaves, what untracked calls move, what a deep copy computes."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
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
    freeze_bn,
    ghost_bn,
    mini_batch_inference,
    precise_bn,
    roi_shuffle,
    sync_bn,
)
from lightning_bn.functional.domain.tensors import STATISTICS
from lightning_bn.layers.behavior import Handle
from tests.functional.domains import EVERY, add_domains, choices
from tests.functional.test_sync_bn import synced
from tests.zoo import images


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    """A process group of one rank, in which everything is computed as over several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SideBySide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [*(nn.BatchNorm2d(3, momentum=m) for m in (0.1, None, 0.0)), timm.layers.BatchNormAct2d(3)]
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
        handle = add_domains(model, row, num_domains=2)
        if not samples:
            handle.set_domain(1)
        else:  # whatever the batch: the first two samples are of one domain
            model.register_forward_pre_hook(lambda m, args: handle.set_domain((torch.arange(len(args[0])) > 1).long()))
            handle._undo.insert(0, model._forward_pre_hooks.clear)
        return handle

    return verb


ghost_bn_of_2 = partial(ghost_bn, size=2)


def adapted(model: nn.Module, **options: Any) -> Handle:
    return adapt_bn(model, BATCHES[:2], **{"prior_samples": 3, **options})


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
    "adapt_bn": adapted,
}
"""Under which training moves none, or what it moved is undone."""
VERBS = TRAINING | CONSTANT


def given(name: str, model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*changes nothing")
        return VERBS[name](model)


def left(model: nn.Module) -> list[Any]:
    """Everything that a model is, but for the values of its tensors."""

    def items(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: id(item) for key, item in value.items()}
        return set(value) if isinstance(value, set) else value

    return [
        (type(m), repr(m), {k: items(v) for k, v in vars(m).items()}, [p.requires_grad for p in m.parameters(False)])
        for m in model.modules()
    ]


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


def step(model: nn.Module, x: Tensor, name: str, value: Any) -> None:
    """A call, and one under an attribute of all layers, as losses like VAT's and GANs' steps set it."""
    model(x)
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    before = [getattr(layer, name) for layer in layers]
    for layer in layers:
        setattr(layer, name, value)
    model(x + 6)
    for layer, own in zip(layers, before, strict=True):
        setattr(layer, name, own)


@pytest.mark.parametrize(
    ("attribute", "value"), [("track_running_stats", False), ("momentum", 0.0), ("training", False)]
)
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


@pytest.mark.parametrize("frozen_first", [True, False])
@pytest.mark.parametrize("name", TRAINING)
def test_frozen_layers_are_those_of_evaluation_in_either_order(name: str, frozen_first: bool) -> None:
    model, (x, *_) = net(), BATCHES
    first, second = (freeze_bn, partial(given, name)) if frozen_first else (partial(given, name), freeze_bn)
    with first(model):
        model(x + 5)
        if name == "mini_batch_inference":
            plain = net()
            plain.load_state_dict(model.state_dict())
            population = plain.eval()(x)
        else:
            population = model.eval()(x)
        with second(model):
            stored = state(model)
            for mode in (True, False):
                assert torch.equal(model.train(mode)(x), population)
            torch.testing.assert_close(state(model), stored, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in TRAINING if "domain" not in name])
def test_a_population_is_estimated_from_whole_batches(name: str) -> None:
    model, plain = net(), net()
    with given(name, model):
        ours = precise_bn(model, BATCHES, forward=lambda m, x: m.train()(x), normalization_batch_size="loader")
    for layer, measured in precise_bn(plain, BATCHES, normalization_batch_size="loader").items():
        assert torch.equal(ours[layer].mean, measured.mean) and torch.equal(ours[layer].var, measured.var)


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
    model, fresh = net(), net()
    handle = domains(row, samples=False)(model)
    train(model)
    twin = copied(model)
    its = domains(row, samples=False)(twin)
    for _ in range(2):
        torch.testing.assert_close(its.state(affine=True), handle.state(affine=True), rtol=0, atol=0)
        torch.testing.assert_close(state(twin), state(model), rtol=0, atol=0)
        train(model)
        train(twin)
    its.undo()
    assert list(twin.state_dict()) == list(fresh.state_dict())
    assert [b.shape for b in twin.buffers()] == [b.shape for b in fresh.buffers()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in fresh.parameters()]


def copied(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a copy evaluates with
        return copy.deepcopy(model)


def test_a_copy_of_domains_takes_other_domains_and_other_verbs_as_a_plain_model() -> None:
    model = net()
    domains(6, samples=False)(model)
    model(BATCHES[0])
    twin = copied(model)
    with adapt_bn(twin, BATCHES):
        pass
    with domain_bn(twin, num_domains=3, **choices(6)) as handle:
        for layer, own in handle.state(affine=True).items():
            assert torch.equal(own["domain_mean"], twin.get_submodule(layer).running_mean.expand(3, -1))
            assert torch.equal(own["domain_weight"], twin.get_submodule(layer).weight.expand(3, -1))
    twin = copied(model)
    with domain_bn(twin, num_domains=2, **choices(4)) as handle, handle.use_domain(0):
        twin(BATCHES[0]).sum().backward()
        assert twin.layers[0].weight.grad is not None and "layers.0.domain_weight" not in twin.state_dict()


def test_a_layer_that_holds_itself_is_copied_once() -> None:
    model = net()
    layer = model.layers[0]
    layer.itself = [layer]
    with ghost_bn(model, size=2):
        twin = copy.deepcopy(model).layers[0]
    assert twin.itself[0] is twin and type(twin) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("ghost_bn", ghost_bn_of_2, r"already has Ghost BN: undo\(\)"),
        ("ghost_bn", sync_bn, "cannot have SyncBN, because it has Ghost BN.*undo"),
        ("sync_bn", ghost_bn_of_2, "cannot have Ghost BN, because it has SyncBN.*undo"),
        ("adapt_bn", adapted, "already has AdaBN"),
        ("mini_batch_inference", adapted, "cannot have AdaBN, because it has mini-batch"),
        ("ghost_bn", domains(4, samples=False), "because it has Ghost BN"),
        *(
            ("domain_bn, row 4", verb, "has domain-specific BN")
            for verb in (ghost_bn_of_2, sync_bn, mini_batch_inference, adapted, domains(4, samples=False))
        ),
    ],
)
def test_verbs_that_do_not_go_together_are_refused_by_name(first: str, second: Verb, message: str) -> None:
    model = net()
    with given(first, model):
        before = left(model)
        with pytest.raises(ValueError, match=rf"Layer 'layers\.0' .*{message}"):
            second(model)
        assert left(model) == before


@pytest.mark.parametrize("name", VERBS)
def test_a_forward_set_on_an_instance_is_refused_by_name(name: str) -> None:
    model = net()
    model.layers[1].forward = model.layers[1].forward
    if name not in ("sync_bn", "roi_shuffle"):
        with pytest.raises(ValueError, match=r"Layer 'layers\.1' has a forward set on the instance"):
            given(name, model)
    with pytest.raises(ValueError, match=r"Layer 'layers\.1' has a forward set on the instance"):
        sync_bn(model)


def rows_of_4(model: nn.Module, **options: Any) -> Any:
    return domain_bn(model, **{"num_domains": 2, **choices(4), **options})


STRANGE: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    *((verb, {"layers": 3}, "layers") for verb in (adapted, ghost_bn_of_2, rows_of_4, freeze_bn, mini_batch_inference)),
    *((verb, {"layers": "x"}, r"layers='x' matches no BatchNorm layer.*There are: layers\.0")
      for verb in (ghost_bn_of_2, freeze_bn, mini_batch_inference, adapted)),
    *((adapted, {"prior_samples": bad}, "prior_samples must be") for bad in ("2", -1, 0.5, True)),
    *((adapted, {name: bad}, name) for name, bad in {"num_samples": 2.5, "progress": "no", "batch_size_fn": 3}.items()),
    (adapted, {"forward": "forward"}, "forward"),
    *((sync_bn, {"group_size": bad}, "group_size must be") for bad in ("2", 0, 2.0, True)),
    (sync_bn, {"layers": 3}, "layers"),
    (ghost_bn, {}, "either size= or splits=, not size=None and splits=None"),
    (ghost_bn, {"size": 2, "splits": 2}, "either size= or splits="),
    (ghost_bn, {"size": 0}, "size must be at least 1 but is 0"),
    (ghost_bn, {"size": "2"}, "size"),
    (ghost_bn, {"splits": True}, "splits"),
    (ghost_bn, {"splits": 1.5}, "splits must be a whole number but is 1.5"),
    (ghost_bn_of_2, {"grouping": "random"}, "'interleaved', 'contiguous' but is 'random'"),
    (ghost_bn_of_2, {"grouping": ["contiguous"]}, "grouping"),
    (rows_of_4, {"num_domains": "2"}, "domains"),
    (rows_of_4, {"level_modules": 3}, "level_modules"),
    *((rows_of_4, {name: bad}, name) for name in ("train_statistics", "population_statistics", "affine")
      for bad in ("domains", True, ["domain"], torch.ones(2))),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "options", "message"), STRANGE)
def test_a_strange_argument_is_refused_by_name_at_the_call(verb: Any, options: Any, message: str) -> None:
    model = net()
    before, stored = left(model), state(model)
    with pytest.raises((TypeError, ValueError), match=message):
        verb(model, **options)
    assert left(model) == before and all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
