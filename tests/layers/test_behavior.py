"""A layer with behaviors stays the layer it is, and loses them in any order."""

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.adapt import Adapting
from lightning_bn.layers.behavior import Behavior, Handle, ModuleBehavior, attach, behaviors_of, detach


class Adds(Behavior):
    """Adds a number to what the layer makes of its input, then multiplies by ten: order shows."""

    def __init__(self, number: float) -> None:
        self.name = f"adds {number}"
        self.number = number

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        return (forward(input) + self.number) * 10


def layer() -> nn.BatchNorm1d:
    return nn.BatchNorm1d(2).eval()


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def test_a_layer_may_be_called_by_keyword() -> None:
    class Renamed(nn.BatchNorm1d):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    for bn, name in ((layer(), "input"), (Renamed(2).eval(), "x")):
        plain = bn(X)
        attach(bn, Adds(1))
        torch.testing.assert_close(bn(**{name: X}), (plain + 1) * 10)
    torch.testing.assert_close(bn(X, 2.0), (plain * 2 + 1) * 10)
    torch.testing.assert_close(bn(scale=2.0, x=X), (plain * 2 + 1) * 10)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_handles_undone_in_any_order_end_at_the_original(order: tuple[int, ...]) -> None:
    bn = layer()
    plain, attributes = bn(X), set(vars(bn))
    behaviors = [Adds(i) for i in range(3)]
    handles = [Handle([bn], behavior) for behavior in behaviors]
    left = behaviors
    for i in (None, *order):
        if i is not None:
            handles[i].undo()
            left = [b for b in left if b is not behaviors[i]]
        assert list(behaviors_of(bn)) == left
        expected = plain
        for behavior in left:  # the last given is outermost
            expected = (expected + behavior.number) * 10
        torch.testing.assert_close(bn(X), expected)
    assert type(bn) is nn.BatchNorm1d and set(vars(bn)) == attributes


def test_a_handle_undoes_once_and_after_an_error_too() -> None:
    bn, undone = layer(), []
    other = Handle([bn], Adds(2))
    with pytest.raises(KeyboardInterrupt), Handle([bn], Adds(1), also=[lambda: undone.append(1)]) as handle:
        raise KeyboardInterrupt
    handle.undo()
    assert undone == [1] and [b.name for b in behaviors_of(bn)] == ["adds 2"]
    other.undo()
    assert type(bn) is nn.BatchNorm1d


def test_the_layer_is_an_instance_of_its_class_whose_repr_has_the_behavior() -> None:
    bn, other = layer(), layer()
    attach(bn, Adds(1))
    attach(other, Adds(2))
    assert type(bn) is type(other), "torch.compile guards on classes: layers of one class share one derived class"
    assert isinstance(bn, nn.BatchNorm1d) and type(bn).__name__ == "BatchNorm1d"
    assert inspect.getdoc(type(bn)) == inspect.getdoc(nn.BatchNorm1d)
    assert repr(bn).startswith("BatchNorm1d(2, eps=1e-05") and repr(bn).endswith(", adds 1)")
    detach(bn, behaviors_of(bn)[0])
    assert "adds" not in repr(bn)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in (2, 4, 5))]
)
@pytest.mark.parametrize("make", [nn.BatchNorm1d, timm.layers.BatchNormAct2d, nn.SyncBatchNorm])
def test_copies_and_pickles_are_plain_and_the_original_stays_as_it_is(make: Any, copied: Any) -> None:
    bn = make(2)
    original = type(bn)
    attributes = set(vars(bn))
    behavior = Adds(1)
    attach(bn, behavior)
    plain = copied(bn)
    assert type(plain) is original and set(vars(plain)) == attributes and not behaviors_of(plain)
    assert behaviors_of(bn) == (behavior,)
    detach(bn, behavior)
    assert type(bn) is original


def test_hooks_and_attributes_set_while_a_layer_behaves_outlive_it() -> None:
    bn, calls = layer(), []
    handle = Handle([bn], Adds(1))
    bn.register_forward_hook(lambda *_: calls.append(1))
    bn.mine = 5
    bn.momentum = 0.3
    bn(X)
    handle.undo()
    bn(X)
    assert calls == [1, 1] and bn.mine == 5 and bn.momentum == 0.3


class Doubles(ModuleBehavior):
    name = "doubled"

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return 2 * call(*args, **kwargs)


def test_a_bound_call_is_the_plain_one_after_undo() -> None:
    module = nn.Identity()
    handle = Handle([module], Doubles())
    call = module.__call__
    assert torch.equal(call(X), 2 * X)
    handle.undo()
    assert torch.equal(call(X), X) and type(module) is nn.Identity


def test_online_a_deep_copy_warns_that_it_is_not_adapted() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    layers = {"0": model[0]}
    with Handle(layers.values(), Adapting(layers, 0)), pytest.warns(UserWarning, match=r"online=True.*not adapted"):
        twin = copy.deepcopy(model)
    assert type(twin[0]) is nn.BatchNorm1d
