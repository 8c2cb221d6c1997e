"""Layers are found by qualified name; a name that finds nothing is an error that lists the names."""

from typing import Any

import pytest
from torch import nn

from lightning_bn import find_bn
from lightning_bn.layers.find import storing_layers
from tests.zoo import cnn


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.body = nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm3d(4), "in": nn.InstanceNorm2d(4)})
        self.sync = nn.SyncBatchNorm(4)
        self.again = self.sync


def test_every_kind_of_batchnorm_is_found_in_order_under_its_first_name_and_nothing_else() -> None:
    model = Backbone()
    found = find_bn(model)
    assert list(found) == ["stem.1", "body.a", "body.b", "sync"]
    assert all(model.get_submodule(name) is layer for name, layer in found.items())
    assert list(find_bn(nn.BatchNorm1d(2))) == [""]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("body.*", ["body.a", "body.b"]),
        (["body.b", "stem.*"], ["stem.1", "body.b"]),
        ("*.[ab]", ["body.a", "body.b"]),
        (("sync",), ["sync"]),
    ],
)
def test_glob_patterns_choose_by_qualified_name(layers: str | list[str], names: list[str]) -> None:
    assert list(find_bn(Backbone(), layers)) == names


@pytest.mark.parametrize(
    ("layers", "error", "match"),
    [
        *[
            (layers, ValueError, r"no BatchNorm layer of Backbone\. .*There are: stem\.1, body\.a, body\.b, sync\.")
            for layers in (["body.*", "head.*"], "BODY.*", "stem")
        ],
        *[(layers, TypeError, "glob pattern over qualified names, or a list of them") for layers in ([], 3, [None])],
    ],
)
def test_what_matches_no_layer_or_is_no_pattern_is_refused(layers: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        find_bn(Backbone(), layers)


def test_lazy_layers_are_refused_by_name_if_they_are_chosen() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="Layer '0' is lazy"):
        find_bn(model)
    assert list(find_bn(model, "1")) == ["1"]


def test_storing_layers_leave_out_those_that_store_nothing_and_refuse_them_by_name() -> None:
    model = cnn(nn.BatchNorm2d(8, track_running_stats=False))
    assert list(storing_layers(model)) == ["5"]
    with pytest.raises(ValueError, match=r"^1: track_running_stats=False"):
        storing_layers(model, "*")
    with pytest.raises(ValueError, match=r"^0, 1: track_running_stats=False"):
        storing_layers(nn.Sequential(*(nn.BatchNorm1d(2, track_running_stats=False) for _ in range(2))))
