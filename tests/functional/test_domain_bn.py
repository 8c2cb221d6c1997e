"""domain_bn on feature levels: torchvision's heads as they are, against Table 5's rows written out by hand."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_bn as lbn
from lightning_bn import domain_bn, find_bn
from lightning_bn.layers.behavior import behaviors_of
from tests.functional.domains import (
    EVERY,
    HEADS,
    OWNERS,
    ROWS,
    Unrolled,
    choices,
    levels,
    outputs_and_gradients,
    retinanet_head,
)


def given(head: nn.Module, row: int, domains: int = 3, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return domain_bn(head, num_domains=domains, level_modules=OWNERS, **choices(row), **options)


@pytest.mark.parametrize("row", EVERY)
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
        if EVERY[row][1] == "domain":
            table = next(b for owner, b in by_hand.by_hand.items() if name.startswith(owner))
            own = handle.state()[name]
            torch.testing.assert_close(own["domain_mean"], table.means[truth], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(own["domain_var"], table.variances[truth], rtol=1e-11, atol=1e-12)
    head.eval(), by_hand.eval()
    for a, b in zip(head(levels()).values(), by_hand(levels()).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    handle.undo()
    assert [type(m) for m in head.modules()] == [type(m) for m in make().modules()]


# ------------------------------------------------------------------------------------------- what happens on the way
class Tower(nn.Module):
    """Two convolutions with BatchNorm, a part of it perhaps checkpointed or broken."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 1), norm(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), norm(4)

    def forward(self, x: Tensor, scale: float = 1) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(scale * x)).tanh()))


class Owner(nn.Module):
    """Runs its tower once for each of a list, by ``call(tower, x)``."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Any] = lambda tower, x: tower(x), **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.call = Tower(**options), call

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [self.call(self.tower, x) for x in inputs]


class Model(nn.Module):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.head = Owner(*args, **options).double()

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self.head(inputs)


def by_owner(model: nn.Module, row: int, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return domain_bn(model, **{"num_domains": 3, "level_modules": "head", **choices(row), **options})


def checkpointed(tower: nn.Module, x: Tensor) -> Any:
    return checkpoint(tower, x, use_reentrant=False)


def checkpointed_in_parts(tower: Tower, x: Tensor) -> Any:
    x = checkpoint(lambda x: tower.norm1(tower.conv1(x)).tanh(), x, use_reentrant=False)
    return checkpoint(lambda x: tower.norm2(tower.conv2(x)), x, use_reentrant=False)


def run(model: nn.Module, inputs: list[Tensor] | None = None) -> list[Tensor]:
    return outputs_and_gradients(model, model, levels() if inputs is None else inputs)


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("call", [checkpointed, checkpointed_in_parts])
@pytest.mark.parametrize("row", [4, 6])
def test_checkpointed_blocks_are_recomputed_as_the_level_they_are(call: Any, row: int) -> None:
    """Two forwards before the backwards, levels of equal shape, and statistics that are counted once."""
    plain, parts = Model(), Model(call)
    handles = by_owner(plain, row), by_owner(parts, row)
    inputs = [[i + (i + 1) * levels(seed=10 * s + i)[0] for i in range(3)] for s in (0, 1)]
    for model in (plain, parts):
        for layer in find_bn(model).values():
            if row == 6:
                nn.init.normal_(layer.domain_weight, generator=torch.Generator().manual_seed(0))
        outputs = [model(x) for x in inputs]
        losses = [sum(((i + 1) * o.pow(3)).sum() for i, o in enumerate(out)) for out in outputs]
        losses[0].backward(), losses[1].backward()
    assert_same([p.grad for p in plain.parameters() if p.requires_grad],
                [p.grad for p in parts.parameters() if p.requires_grad])  # fmt: skip
    assert_same(everything(plain).values(), everything(parts).values())
    assert handles[0].state() and int(plain.head.tower.norm1.num_batches_tracked) == 2


def test_a_checkpoint_that_hides_the_level_or_parts_levels_is_refused_by_name() -> None:
    reentrant = Model(lambda tower, x: checkpoint(tower, x, use_reentrant=True))
    by_owner(reentrant, 4)
    outputs = reentrant([x.requires_grad_() for x in levels()])
    with pytest.raises(RuntimeError, match=r"'head\.tower\.norm1' was run outside.*use_reentrant=False"):
        sum(o.sum() for o in outputs).backward()
    hidden = Model(lambda tower, x: checkpoint(lambda x: tower(2 * x), x, use_reentrant=False))
    by_owner(hidden, 4)
    with pytest.raises(RuntimeError, match=r"'head\.tower\.norm1' was run outside"):
        run(hidden)
    together = Model(checkpointed)
    by_owner(together, 1)
    with pytest.raises(
        RuntimeError, match=r"normalized together \(train_statistics='shared'\).*train_statistics='domain'"
    ):
        run(together)


@pytest.mark.parametrize("row", [1, 2, 4])
def test_an_owner_that_is_checkpointed_as_a_whole_works(row: int) -> None:
    plain, whole = Model(), Model()
    by_owner(plain, row), by_owner(whole, row)
    whole.forward = lambda inputs: checkpoint(whole.head, inputs, use_reentrant=False)
    assert_same(run(whole), run(plain))
    assert_same(everything(whole).values(), everything(plain).values())  # updated once


@pytest.mark.parametrize("row", ROWS)
def test_an_exception_in_mid_forward_and_an_extra_forward_leave_the_levels_right(row: int) -> None:
    class Broken(Exception):
        pass

    def break_at(level: Tensor | None) -> Callable[..., Any]:
        def call(tower: Tower, x: Tensor) -> Tensor:
            y = tower.conv1(x) if row in (3, 4, 5, 6) and x is level else tower(x)
            if x is level:
                tower.norm1(y) if row in (3, 4, 5, 6) else None
                raise Broken
            return y

        return call

    broken, plain = Model(), Model()
    handle = by_owner(broken, row)
    by_owner(plain, row)
    inputs = levels(seed=1)
    before = {k: v.clone() for k, v in everything(broken).items()}
    broken.head.call = break_at(inputs[1])
    with pytest.raises(Broken):
        broken(inputs)
    with torch.no_grad():
        for key, value in everything(broken).items():
            value.copy_(before[key])
    broken.head.call = break_at(None)
    broken.eval()(inputs), plain.eval()  # an extra forward
    broken.train(), plain.train()
    assert_same(run(broken), run(plain))
    assert_same(everything(broken).values(), everything(plain).values())
    handle.undo()
    assert [type(m) for m in broken.modules()] == [type(m) for m in Model().modules()]


def test_an_error_in_a_tower_in_lockstep_comes_out_as_it_is_and_leaves_nothing() -> None:
    model = Model()
    handle = by_owner(model, 1)
    with pytest.raises(RuntimeError, match="expected input"):
        model([*levels()[:2], torch.zeros(2, 5, 3, 3, dtype=torch.float64)])
    assert_same(run(model), run_of_plain(1))
    handle.undo()
    assert sorted(everything(model)) == sorted(everything(Model()))


def run_of_plain(row: int) -> list[Tensor]:
    fresh = Model()
    by_owner(fresh, row)
    return run(fresh)


@pytest.mark.parametrize(
    ("owner", "call", "error", "words"),
    [
        ("head", lambda tower, x: tower(x + 1), TypeError, r"'head\.tower' got a tensor that is not in the input of 'head'"),
        ("head", lambda tower, x: tower(tower(x)), TypeError, r"'head\.tower' got a tensor that is not in the input"),
        ("head", lambda tower, x: [tower(x), tower(x)][0], TypeError, r"or got it twice"),
        ("head", lambda tower, x: tower(x, 2), TypeError, r"'head\.tower' got 2 arguments.*train_statistics='domain'"),
        ("head", lambda tower, x: tower(x, scale=2), TypeError, r"'head\.tower' got 2 arguments"),
        ("head", lambda tower, x: tower.norm1(x), TypeError, r"'head\.tower\.norm1' got a single level"),
        ("head.tower", lambda tower, x: tower(x), RuntimeError, "got 1 tensors, but num_domains=3"),
    ],
)  # fmt: skip
def test_a_tower_whose_input_is_no_level_is_refused_by_name(owner: str, call: Any, error: Any, words: str) -> None:
    model = Model(call)
    by_owner(model, 1, level_modules=owner)
    with pytest.raises(error, match=words):
        model(levels())


def test_levels_may_be_asked_for_in_any_order_and_towers_be_in_containers() -> None:
    backwards, held = Model(), Model()
    backwards.head.forward = lambda inputs: [backwards.head.tower(x) for x in reversed(inputs)][::-1]
    held.head.tower = nn.ModuleDict({"of": nn.ModuleList([held.head.tower])})
    held.head.call = lambda tower, x: tower["of"][0](x)
    for model in (backwards, held):
        by_owner(model, 1)
        assert_same(run(model), run_of_plain(1))


def test_a_layer_that_does_not_track_statistics_moves_none() -> None:
    """As Lightning's BaseFinetuning leaves it: it still normalizes each level by itself."""
    model = Model()
    by_owner(model, 4)
    for layer in find_bn(model).values():
        layer.track_running_stats = False
    before = {k: v.clone() for k, v in everything(model).items()}
    assert_same(run(model), run_of_plain(4))
    assert_same(everything(model).values(), before.values())


def test_a_tower_may_be_given_its_level_by_name_and_more_where_levels_are_apart() -> None:
    by_name = Model(lambda tower, x: tower(x=x))
    by_owner(by_name, 1)
    assert_same(run(by_name), run_of_plain(1))
    for row, call in ((4, lambda tower, x: tower(x, scale=2)), (1, lambda tower, x: tower(x, 2))):
        scaled, plain = Model(call), Model(lambda tower, x: tower(2 * x))
        for model in (scaled, plain):
            by_owner(model, row)
            model.train(row == 4)
        assert_same(run(scaled), run(plain))


@pytest.mark.parametrize("row", [1, 4])
def test_another_number_of_levels_is_refused(row: int) -> None:
    model = Model()
    by_owner(model, row)
    for number in (2, 4):
        with pytest.raises(RuntimeError, match="num_domains=3"):
            model(levels(number=number))
    with pytest.raises(RuntimeError, match=r"'head\.tower(\.norm1)?' was run outside of a forward of 'head'"):
        model.head.tower(levels()[0])


def test_owners_and_layers_are_chosen_by_patterns_and_refused_by_name() -> None:
    head = retinanet_head()
    with pytest.raises(ValueError, match="level_modules='neck' matches no module of RetinaNetHead"):
        domain_bn(head, num_domains=3, level_modules="neck", **choices(4))
    with pytest.raises(ValueError, match="matches 'classification_head' and 'classification_head.*' within it"):
        domain_bn(head, num_domains=3, level_modules="classification_head*", **choices(4))
    with pytest.raises(ValueError, match=r"Layer 'regression_head\.conv\.0\.1' is in none of the level modules"):
        domain_bn(head, num_domains=3, level_modules="classification_head", layers="*", **choices(4))
    handle = domain_bn(head, num_domains=3, level_modules="*_head", layers="*.0.1", **choices(4))
    assert list(handle.layers) == ["classification_head.conv.0.1", "regression_head.conv.0.1"]
    for verb in (ghost, lbn.sync_bn, lbn.mini_batch_inference, again):
        with pytest.raises(ValueError, match=r"'classification_head\.conv\.0\.1' .* has domain-specific BN"):
            verb(head)
    with pytest.raises(ValueError, match="cannot have AdaBN, because it has domain-specific BN"):
        lbn.adapt_bn(head, [levels()], forward=lambda m, b: m(b))
    handle.undo()
    with lbn.ghost_bn(head, size=2), pytest.raises(ValueError, match="because it has Ghost BN"):
        again(head)
    with pytest.raises(ValueError, match=r"Layer '0' has no weight and bias"):
        domain_bn(nn.Sequential(nn.BatchNorm2d(2, affine=False)), num_domains=3, **choices(6))
    model = nn.Sequential(nn.SyncBatchNorm(2))
    with pytest.raises(TypeError, match="'0' is a SyncBatchNorm"):
        domain_bn(model, num_domains=3, **choices(4))
    assert not any(behaviors_of(m) for m in head.modules())


class Final(nn.Identity):
    """A module whose class nothing can be derived from, so that it takes no behavior."""

    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


@pytest.mark.parametrize("row", EVERY)
def test_where_one_module_cannot_follow_the_model_is_left_as_it_was(row: int) -> None:
    model, before = Model(), Model()
    model.head.last = Final()  # comes after all layers
    for _ in range(2):  # and nothing stands in the way of another attempt
        with pytest.raises(TypeError, match="Final is final"):
            by_owner(model, row)
    assert not any(behaviors_of(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert everything(model).keys() == everything(before).keys()
    assert_same(run(model), run(before))


@pytest.mark.parametrize("row", EVERY)
def test_a_scripted_module_in_a_tower_and_a_layer_that_counts_no_batches_are_taken_as_they_are(row: int) -> None:
    found = []
    for odd in (False, True):
        model = Model()
        if odd:
            model.head.tower.conv2 = torch.jit.script(model.head.tower.conv2)
            model.head.tower.norm1.num_batches_tracked = None
        handle = by_owner(model, row)
        kept = handle.state().get("head.tower.norm1", {})
        found.append([*run(model), *model.eval()(levels()), *kept.values()])
        handle.undo()
    assert_same(*found)


def ghost(head: nn.Module) -> Any:
    return lbn.ghost_bn(head, size=2)


def again(head: nn.Module) -> Any:
    return domain_bn(head, num_domains=3, level_modules="*_head", **choices(4))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("row", [1, 4])
def test_a_copy_is_the_plain_model_and_the_keys_stay(row: int, copy_of: Any) -> None:
    head = retinanet_head()
    keys = list(head.state_dict())
    handle = given(head, row)
    head(levels())
    twin = copy_of(head)
    assert list(head.state_dict()) == list(twin.state_dict()) == keys
    assert [type(m) for m in twin.modules()] == [type(m) for m in retinanet_head().modules()]
    retinanet_head().load_state_dict(twin.state_dict(), strict=True)
    handle.undo()
    assert {n for n, _ in head.named_buffers()} == {n for n, _ in retinanet_head().named_buffers()}
    assert all(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("row", ROWS)
def test_frozen_layers_use_the_population_that_evaluation_uses(row: int) -> None:
    head = retinanet_head()
    given(head, row)
    head(levels())
    evaluated = head.eval()(levels(seed=1))
    head.train()
    with lbn.freeze_bn(head):
        frozen = head(levels(seed=1))
    assert_same(frozen.values(), evaluated.values())


def test_the_affine_of_domains_is_frozen_with_the_layer() -> None:
    model = Model()
    handle = by_owner(model, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.head.tower.norm1.domain_weight.clone()
    with lbn.freeze_bn(model, affine=True):
        sum(y.square().sum() for y in model(levels())).backward()
        optimizer.step()
    assert torch.equal(model.head.tower.norm1.domain_weight, before)
    handle.undo()
    assert all(p.requires_grad for p in model.parameters()), "its own one again"


@pytest.mark.parametrize("row", ROWS)
def test_a_layer_with_an_activation_of_its_own_keeps_it(row: int) -> None:
    act, plain = (
        Model(norm=n) for n in (timm.layers.BatchNormAct2d, lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()))
    )
    by_owner(act, row), by_owner(plain, row)
    assert_same(run(act), run(plain))
    assert_same(act.eval()(levels()), plain.eval()(levels()))


@pytest.mark.parametrize("row", [1, 4])
def test_levels_may_be_rows_and_may_hold_unequally_many_samples(row: int) -> None:
    """A layer that averages all batches (momentum=None), against moments by hand."""
    for shape in ((), (5,)):
        model = nn.Sequential(nn.ModuleList([nn.BatchNorm1d(4, momentum=None, affine=False)]))
        model.double()
        model[0].forward = None  # it is the list that is an owner's child
        owner = Owner()
        owner.tower = nn.Sequential(nn.BatchNorm1d(4, momentum=None, affine=False).double())
        root = nn.Sequential(owner)
        handle = domain_bn(root, num_domains=3, level_modules="0", **choices(row))
        batches = [[torch.randn(n, 4, *shape, dtype=torch.float64) + d for d, n in enumerate((3, 2, 6))] for _ in "ab"]
        rows = [[x.movedim(1, -1).flatten(0, -2) for x in batch] for batch in batches]
        outputs = [root(batch) for batch in batches]
        for out, batch in zip(outputs, rows, strict=True):
            for d, y in enumerate(out):
                own = torch.cat(batch) if row == 1 else batch[d]
                expected = (batch[d] - own.mean(0)) / (own.var(0, correction=0) + 1e-5).sqrt()
                torch.testing.assert_close(y.movedim(1, -1).flatten(0, -2), expected, rtol=1e-10, atol=1e-10)
        layer = owner.tower[0]
        wholes = [torch.cat(batch) for batch in rows]
        assert_same([layer.running_mean, layer.running_var],
                    [sum(w.mean(0) for w in wholes) / 2, sum(w.var(0) for w in wholes) / 2])  # fmt: skip
        for d in range(3) if row == 4 else ():
            mean = handle.state()["0.tower.0"]["domain_mean"][d]
            torch.testing.assert_close(mean, (rows[0][d].mean(0) + rows[1][d].mean(0)) / 2)


def test_levels_in_lockstep_keep_autocast_and_grad_mode() -> None:
    model = Model().float()
    by_owner(model, 1)
    inputs = [x.float() for x in levels()]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
    assert all(o.dtype == torch.bfloat16 and o.requires_grad for o in outputs)
    with torch.no_grad():
        assert not any(o.requires_grad for o in model(inputs))


@pytest.mark.parametrize("row", [1, 4])
def test_16_bit_layers_work_and_round_statistics_once(row: int) -> None:
    model, truth = Model().bfloat16(), Model()
    seen: list[Tensor] = []
    layer = model.head.tower.norm1
    layer.momentum = 1.0
    model.head.tower.conv1.register_forward_hook(lambda *args: seen.append(args[2].detach().double()))
    handle = by_owner(model, row)
    by_owner(truth, row)
    truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    for ours, theirs in zip(model([x.bfloat16() for x in levels()]), truth(levels()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.1, atol=0.15)
    rows = [x.movedim(1, -1).flatten(0, -2) for x in seen]
    own = handle.state()
    for name, of in (("mean", torch.mean), ("var", torch.var)) if row == 4 else ():  # else torch's kernel takes them
        pooled, each = getattr(layer, f"running_{name}"), own["head.tower.norm1"][f"domain_{name}"]
        torch.testing.assert_close(pooled.double(), of(torch.cat(rows), 0), rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(each.double(), torch.stack([of(r, 0) for r in rows]), rtol=2**-8, atol=1e-3)
