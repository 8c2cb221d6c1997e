"""domain_bn on feature levels: torchvision's heads as they are, against Table 5's rows written out by hand."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import domain_bn, find_bn, freeze_bn, precise_bn
from tests.functional import domains
from tests.functional.domains import EVERY, HEADS, LEVEL_MODULES, ROWS, Unrolled, as_rows, choices, levels


def add_domains(model: nn.Module, row: int, **options: Any) -> Any:
    return domains.add_domains(model, row, **{"level_modules": LEVEL_MODULES, **options})


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(list(ours), list(theirs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kind", "row"), [*(("RetinaNet", row) for row in EVERY), ("FCOS", 1), ("FCOS", 6)])
def test_a_head_trains_and_evaluates_as_its_row_of_table_5(kind: str, row: int) -> None:
    head = HEADS[kind]()
    handle, keys = add_domains(head, row), list(head.state_dict())
    by_hand = Unrolled(head, row, 3)
    for step in range(3):
        inputs = levels(seed=step)
        assert_same(
            domains.outputs_and_gradients(head, head, inputs),
            domains.outputs_and_gradients(by_hand, by_hand.head, inputs),
        )
    for name, layer in find_bn(head).items():
        truth = by_hand.head.get_submodule(name)
        assert_same((layer.running_mean, layer.running_var), by_hand.bn.running[truth])
        assert int(layer.num_batches_tracked) == 3
        if EVERY[row][1] == "domain":
            own = handle.state()[name]
            assert_same((own["domain_mean"], own["domain_var"]), (by_hand.bn.means[truth], by_hand.bn.variances[truth]))
    head.eval(), by_hand.eval()
    assert_same(head(levels()).values(), by_hand(levels()).values())
    handle.undo()
    fresh = HEADS[kind]()
    assert [type(m) for m in head.modules()] == [type(m) for m in fresh.modules()]
    assert list(head.state_dict()) == list(fresh.state_dict())
    assert {n for n, _ in head.named_buffers()} == {n for n, _ in fresh.named_buffers()}
    assert EVERY[row][2] == "domain" or keys == list(fresh.state_dict())
    assert all(p.requires_grad for p in head.parameters())


class Tower(nn.Module):
    """Two convolutions with BatchNorm, a part of it perhaps checkpointed or broken."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 1), norm(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), norm(4)

    def forward(self, x: Tensor, scale: float = 1) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(scale * x)).tanh()))


class LevelModule(nn.Module):
    def __init__(self, call: Callable[[Any, Tensor], Any], tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.call = tower, call

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [self.call(self.tower, x) for x in inputs]


def plainly(tower: nn.Module, x: Tensor) -> Tensor:
    return tower(x)


def model_with(row: int | None, call: Any = plainly, norm: Any = nn.BatchNorm2d, **options: Any) -> Any:
    """A model whose ``head`` has levels; with domains as in a row of Table 5."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(OrderedDict(head=LevelModule(call, Tower(norm)))).double()
    if row:
        model.handle = add_domains(model, row, **{"level_modules": "head", **options})
    return model


def run(model: nn.Module) -> list[Tensor]:
    return domains.outputs_and_gradients(model, model, levels())


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def checkpointed(tower: nn.Module, x: Tensor) -> Any:
    return checkpoint(tower, x, use_reentrant=False)


def checkpointed_in_parts(tower: Tower, x: Tensor) -> Any:
    x = checkpoint(lambda x: tower.norm1(tower.conv1(x)).tanh(), x, use_reentrant=False)
    return checkpoint(lambda x: tower.norm2(tower.conv2(x)), x, use_reentrant=False)


@pytest.mark.parametrize("call", [checkpointed, checkpointed_in_parts])
@pytest.mark.parametrize("row", [4, 6])
def test_checkpointed_blocks_are_recomputed_as_the_level_they_are(call: Any, row: int) -> None:
    plain, parts = model_with(row), model_with(row, call)
    inputs = [[i + (i + 1) * levels(seed=10 * s + i)[0] for i in range(3)] for s in (0, 1)]
    for model in (plain, parts):
        for layer in find_bn(model).values() if row == 6 else ():
            nn.init.normal_(layer.domain_weight, generator=torch.Generator().manual_seed(0))
        outputs = [model(x) for x in inputs]
        losses = [sum(((i + 1) * o.pow(3)).sum() for i, o in enumerate(out)) for out in outputs]
        losses[0].backward(), losses[1].backward()
    assert_same(*([p.grad for p in m.parameters() if p.requires_grad] for m in (plain, parts)))
    assert_same(everything(plain).values(), everything(parts).values())
    assert int(plain.head.tower.norm1.num_batches_tracked) == 2


def reentrant(tower: nn.Module, x: Tensor) -> Any:
    return checkpoint(tower, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize(
    ("row", "call", "message"),
    [
        (4, reentrant, r"'head\.tower\.norm1' was run outside.*use_reentrant=False"),
        (4, lambda tower, x: checkpoint(lambda x: tower(2 * x), x, use_reentrant=False),
         r"'head\.tower\.norm1' was run outside"),
        (1, checkpointed, r"normalized together \(train_statistics='shared'\).*train_statistics='domain'"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_hides_the_level_or_parts_levels_is_refused(row: int, call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        sum(y.sum() for y in model_with(row, call)(levels())).backward()


@pytest.mark.parametrize("row", [1, 4])
def test_a_level_module_that_is_checkpointed_as_a_whole_works(row: int) -> None:
    plain, whole = model_with(row), model_with(row)
    whole.forward = lambda inputs: checkpoint(whole.head, inputs, use_reentrant=False)
    assert_same(run(whole), run(plain))
    assert_same(everything(whole).values(), everything(plain).values())  # updated once


@pytest.mark.parametrize("row", [1, 6])
def test_an_exception_in_mid_forward_and_an_extra_forward_leave_the_levels_right(row: int) -> None:
    broken, plain, inputs = model_with(row), model_with(row), levels(seed=1)
    before = {k: v.clone() for k, v in everything(broken).items()}

    def break_at_the_second(tower: Tower, x: Tensor) -> Tensor:
        y = tower.conv1(x) if row >= 4 and x is inputs[1] else tower(x)
        if x is inputs[1]:
            tower.norm1(y) if row >= 4 else None
            raise ZeroDivisionError
        return y

    broken.head.call = break_at_the_second
    with pytest.raises(ZeroDivisionError):
        broken(inputs)
    with torch.no_grad():
        for key, value in everything(broken).items():
            value.copy_(before[key])
    broken.head.call = plainly
    broken.eval()(inputs)  # an extra forward
    assert_same(run(broken.train()), run(plain))
    assert_same(everything(broken).values(), everything(plain).values())


def test_an_error_in_a_tower_in_lockstep_comes_out_as_it_is_and_leaves_nothing() -> None:
    model = model_with(1)
    with pytest.raises(RuntimeError, match="expected input"):
        model([*levels()[:2], torch.zeros(2, 5, 3, 3, dtype=torch.float64)])
    assert_same(run(model), run(model_with(1)))
    model.handle.undo()
    assert sorted(everything(model)) == sorted(everything(model_with(None)))


@pytest.mark.parametrize(
    ("module", "call", "error", "words"),
    [
        ("head", lambda tower, x: tower(x + 1), TypeError, r"'head\.tower' got a tensor that is not in the input"),
        ("head", lambda tower, x: tower(tower(x)), TypeError, r"'head\.tower' got a tensor that is not in the input"),
        ("head", lambda tower, x: [tower(x), tower(x)][0], TypeError, r"or got it twice"),
        ("head", lambda tower, x: tower(x, 2), TypeError, r"'head\.tower' got 2 arguments.*train_statistics='domain'"),
        ("head", lambda tower, x: tower(x, scale=2), TypeError, r"'head\.tower' got 2 arguments"),
        ("head", lambda tower, x: tower.norm1(x), TypeError, r"'head\.tower\.norm1' got a single level"),
        ("head.tower", plainly, RuntimeError, "got 1 tensors, but num_domains=3"),
    ],
)
def test_a_tower_whose_input_is_no_level_is_refused_by_name(module: str, call: Any, error: Any, words: str) -> None:
    model = model_with(1, call, level_modules=module)
    with pytest.raises(error, match=words):
        model(levels())


@pytest.mark.parametrize("row", [1, 4])
def test_another_number_of_levels_is_refused(row: int) -> None:
    model = model_with(row)
    for number in (2, 4):
        with pytest.raises(RuntimeError, match="num_domains=3"):
            model(levels(number=number))
    with pytest.raises(RuntimeError, match=r"'head\.tower(\.norm1)?' was run outside of a forward of 'head'"):
        model.head.tower(levels()[0])


def test_levels_may_be_asked_for_in_any_order_or_by_name_and_towers_be_in_containers() -> None:
    backwards, held, by_name = model_with(1), model_with(None), model_with(1, lambda tower, x: tower(x=x))
    backwards.head.forward = lambda inputs: [backwards.head.tower(x) for x in reversed(inputs)][::-1]
    held.head.tower = nn.ModuleDict({"of": nn.ModuleList([held.head.tower])})
    held.head.call = lambda tower, x: tower["of"][0](x)
    add_domains(held, 1, level_modules="head")
    for model in (backwards, held, by_name):
        assert_same(run(model), run(model_with(1)))
    for row, call in ((4, lambda tower, x: tower(x, scale=2)), (1, lambda tower, x: tower(x, 2))):
        scaled, plain = model_with(row, call), model_with(row, lambda tower, x: tower(2 * x))
        assert_same(run(scaled.train(row == 4)), run(plain.train(row == 4)))  # more, where levels are apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level_modules": "neck"}, "level_modules='neck' matches no module of RetinaNetHead"),
        ({"level_modules": "classification_head*"}, r"matches 'classification_head' and .* within it"),
        ({"level_modules": "classification_head", "layers": "*"},
         r"Layer 'regression_head\.conv\.0\.1' is in none of the level modules"),
    ],
)  # fmt: skip
def test_level_modules_that_match_nothing_or_too_much_are_refused(options: Any, message: str) -> None:
    head = domains.retinanet_head()
    with pytest.raises(ValueError, match=message):
        add_domains(head, 4, **options)
    handle = add_domains(head, 4, level_modules="*_head", layers="*.0.1")
    assert list(handle.layers) == ["classification_head.conv.0.1", "regression_head.conv.0.1"]
    handle.undo()
    assert [type(m) for m in head.modules()] == [type(m) for m in domains.retinanet_head().modules()]


@pytest.mark.parametrize(
    ("layer", "row", "error", "message"),
    [
        (nn.BatchNorm2d(2, affine=False), 6, ValueError, "Layer '0' has no weight and bias"),
        (nn.SyncBatchNorm(2), 4, TypeError, "'0' is a SyncBatchNorm"),
    ],
)
def test_a_layer_that_cannot_have_domains_is_refused_by_name(layer: Any, row: int, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        domain_bn(nn.Sequential(layer), num_domains=3, **choices(row))


class Final(nn.Identity):
    """A module whose class nothing can be derived from, so that it takes no behavior."""

    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


@pytest.mark.parametrize("row", [1, 6])
def test_where_one_module_cannot_follow_the_model_is_left_as_it_was(row: int) -> None:
    model, before = model_with(None), model_with(None)
    model.head.last = Final()  # comes after all layers
    for _ in range(2):  # another attempt fails in the same way
        with pytest.raises(TypeError, match="Final is final"):
            add_domains(model, row, level_modules="head")
    assert [type(m) for m in model.head.tower.modules()] == [type(m) for m in before.head.tower.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert everything(model).keys() == everything(before).keys()
    assert_same(run(model), run(before))


@pytest.mark.parametrize("row", [1, 4])
def test_a_scripted_module_in_a_tower_and_a_layer_that_counts_no_batches_are_taken_as_they_are(row: int) -> None:
    found = []
    for odd in (False, True):
        model = model_with(None)
        if odd:
            model.head.tower.conv2 = torch.jit.script(model.head.tower.conv2)
            model.head.tower.norm1.num_batches_tracked = None
        kept = add_domains(model, row, level_modules="head").state().get("head.tower.norm1", {})
        found.append([*run(model), *model.eval()(levels()), *kept.values()])
    assert_same(*found)


def test_the_affine_of_domains_is_frozen_with_the_layer() -> None:
    model = model_with(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.head.tower.norm1.domain_weight.clone()
    with freeze_bn(model, affine=True):
        sum(y.square().sum() for y in model(levels())).backward()
        optimizer.step()
    assert torch.equal(model.head.tower.norm1.domain_weight, before)
    model.handle.undo()
    assert all(p.requires_grad for p in model.parameters()), "its own one again"


@pytest.mark.parametrize("row", [1, 6])
def test_a_layer_with_an_activation_of_its_own_keeps_it(row: int) -> None:
    act = model_with(row, norm=timm.layers.BatchNormAct2d)
    plain = model_with(row, norm=lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()))
    assert_same(run(act), run(plain))
    assert_same(act.eval()(levels()), plain.eval()(levels()))


@pytest.mark.parametrize(("row", "shape"), [(1, ()), (1, (5,)), (4, (5,))])
def test_levels_may_be_rows_and_may_hold_unequally_many_samples(row: int, shape: tuple[int, ...]) -> None:
    layer = nn.BatchNorm1d(4, momentum=None, affine=False).double()
    root = nn.Sequential(LevelModule(plainly, nn.Sequential(layer)))
    handle = add_domains(root, row, level_modules="0")
    batches = [[torch.randn(n, 4, *shape, dtype=torch.float64) + d for d, n in enumerate((3, 2, 6))] for _ in "ab"]
    rows = [[as_rows(x) for x in batch] for batch in batches]
    for batch, given in zip(batches, rows, strict=True):
        for d, y in enumerate(root(batch)):
            own = torch.cat(given) if row == 1 else given[d]
            expected = (given[d] - own.mean(0)) / (own.var(0, correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(as_rows(y), expected, rtol=1e-10, atol=1e-10)
    wholes = [torch.cat(batch) for batch in rows]
    assert_same([layer.running_mean], [sum(w.mean(0) for w in wholes) / 2])
    assert_same([layer.running_var], [sum(w.var(0) for w in wholes) / 2])
    for d in range(3) if row == 4 else ():
        mean = handle.state()["0.tower.0"]["domain_mean"][d]
        torch.testing.assert_close(mean, (rows[0][d].mean(0) + rows[1][d].mean(0)) / 2)


def test_16_bit_layers_work_and_round_statistics_once() -> None:
    model, truth = model_with(None).bfloat16(), model_with(4)
    seen: list[Tensor] = []
    layer = model.head.tower.norm1
    layer.momentum = 1.0
    model.head.tower.conv1.register_forward_hook(lambda *args: seen.append(as_rows(args[2].detach().double())))
    handle = add_domains(model, 4, level_modules="head")
    truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    for ours, theirs in zip(model([x.bfloat16() for x in levels()]), truth(levels()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.1, atol=0.15)
    for name, of in (("mean", torch.mean), ("var", torch.var)):
        pooled, each = getattr(layer, f"running_{name}"), handle.state()["head.tower.norm1"][f"domain_{name}"]
        torch.testing.assert_close(pooled.double(), of(torch.cat(seen), 0), rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(each.double(), torch.stack([of(r, 0) for r in seen]), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "row", "together"),
    [*(("RetinaNet", row, True) for row in ROWS), ("RetinaNet", 2, False), ("RetinaNet", 6, False), ("FCOS", 1, True)],
)
@torch.no_grad()
def test_a_pass_measures_levels_as_they_are_trained(kind: str, row: int, together: bool) -> None:
    head, batches = HEADS[kind](), [levels(n, seed=n) for n in (2, 3, 1)]
    handle = add_domains(head, row)
    for layer in find_bn(head).values():
        for p in layer.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    by_hand, given = Unrolled(head, row, 3), dict[str, list[list[Tensor]]]()
    for x in [[torch.cat(level) for level in zip(*batches, strict=True)]] if together else batches:
        by_hand(x)
        for name, rows in by_hand.inputs.items():
            given.setdefault(name, []).append(rows)
    batch_size: Any = "population" if together else "loader"
    statistics = precise_bn(head, batches, forward=lambda m, b: m(b), normalization_batch_size=batch_size)
    assert set(statistics) == set(given)
    for name, layer in find_bn(head).items():
        own = handle.state().get(name)
        assert (own is not None) == (ROWS[row][1] == "domain")
        measured = [(layer.running_mean, layer.running_var)]
        measured += zip(own["domain_mean"], own["domain_var"], strict=True) if own else []
        each = [torch.cat(level) for level in zip(*given[name], strict=True)]
        for statistics_of, rows in zip(measured, [torch.cat(each), *each], strict=False):
            truth = rows.mean(0), rows.var(0, correction=0)
            torch.testing.assert_close(statistics_of, truth, rtol=1e-9, atol=1e-10)
