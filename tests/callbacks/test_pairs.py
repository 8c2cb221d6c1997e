"""Every pair of callbacks on one layer does what the table in the docs says."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule

import lightning_bn as lbn
from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.layers.conflicts import FEATURES, PAIRS, Pair
from tests.callbacks.zoo import CALLBACKS, TinyNet, caught, digest, fit, train_loader, val_loader
from tests.ranks import run_on_ranks

MAKE: dict[str, Callable[[], Any]] = {make.func.__name__: make for make in reversed(CALLBACKS.values())}
MAKE["BatchLeakageMonitor"] = functools.partial(lbn.BatchLeakageMonitor, 24)  # also beside mini-batch inference
"""One of each class."""
KINDS: dict[str, str] = {name: getattr(lbn, name).kind for name in MAKE}
ALL = list(itertools.combinations(sorted(MAKE), 2))


def pair_of(first: str, second: str) -> Pair:
    kinds = frozenset((KINDS[first], KINDS[second]))
    return PAIRS.get(kinds, Pair("works", "")) if len(kinds) == 2 else Pair("refused", "both do the same")


def train_and_test(first: str, second: str, **trainer: Any) -> LightningModule:
    module = TinyNet()
    fitted = fit(module, [MAKE[first](), MAKE[second]()], train_loader(shuffle=True), **trainer)
    fitted.test(module, val_loader())
    return module


def assert_plain(module: LightningModule) -> None:
    """The module has no behaviors left, and finite parameters and buffers."""
    assert all(type(m) is type(p) for m, p in zip(module.modules(), TinyNet().modules(), strict=True))
    assert TinyNet().load_state_dict(module.state_dict(), strict=True)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_every_callback_has_a_kind_of_the_table() -> None:
    public = [getattr(lbn, name) for name in lbn.__all__]
    assert {c.__name__ for c in public if isinstance(c, type) and issubclass(c, BatchNormCallback)} == set(MAKE)
    assert set(KINDS.values()) == set(FEATURES) == set(FEATURES) | {kind for kinds in PAIRS for kind in kinds}


@pytest.mark.parametrize(("first", "second"), ALL)
def test_a_pair_does_what_the_table_says(first: str, second: str) -> None:
    verdict, why = pair_of(first, second)
    with caught("77.9 to 48.5") as said:
        if verdict == "refused":
            for pair in ((first, second), (second, first)):
                with pytest.raises(ValueError, match=why):
                    train_and_test(*pair)
            return
        module = train_and_test(first, second)
    assert_plain(module)
    assert bool(said) == (verdict == "warns")


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("other", [name for name in MAKE if name != "BNStatsMonitor"])
def test_with_the_monitor_training_is_bit_identical_to_training_without(other: str) -> None:
    modules = TinyNet(0.5), TinyNet(0.5)
    fit(modules[0], [MAKE["BNStatsMonitor"](), MAKE[other]()], train_loader(shuffle=True))
    fit(modules[1], MAKE[other](), train_loader(shuffle=True))
    assert digest(modules[0].state_dict()) == digest(modules[1].state_dict())


def test_a_pair_that_is_refused_works_on_different_layers() -> None:
    callbacks = [lbn.GhostBNCallback(size=4, layers="bn1"), lbn.SyncBNCallback(layers="bn2")]
    module = TinyNet()
    fit(module, callbacks, max_epochs=1)
    assert_plain(module)


def test_a_subclass_counts_as_the_callback_it_is_derived_from() -> None:
    class Own(lbn.GhostBNCallback):
        pass

    for other in (lbn.SyncBNCallback(), lbn.GhostBNCallback(splits=2)):
        with pytest.raises(ValueError, match=f"Own and {type(other).__name__} act on layer 'bn1'"):
            fit(TinyNet(), [Own(size=4), other])


def table() -> str:
    order = {"refused": 0, "warns": 1, "works": 2}
    lines = ["| together on one layer | | |", "|---|---|---|"]
    for kinds, pair in sorted(PAIRS.items(), key=lambda item: order[item[1].verdict]):
        names = " + ".join(sorted((FEATURES[kind] for kind in kinds), key=str.lower))
        lines.append(f"| {names} | **{pair.verdict}** | {pair.reason} |")
    return "\n".join(lines)


def test_the_docs_have_the_table_as_it_is() -> None:
    page = Path(__file__).parents[2] / "docs" / "callbacks" / "pairs.md"
    assert table() in page.read_text(encoding="utf-8"), f"the page should have:\n{table()}"


def all_pairs_on_rank() -> dict[str, Any]:
    found = {}
    for first, second in ALL:
        if pair_of(first, second).verdict != "refused":
            module = train_and_test(first, second, devices=2, strategy="ddp")
            assert_plain(module)
            found[f"{first}, {second}"] = digest(dict(module.named_parameters()))
    return found


@pytest.mark.ddp
def test_every_pair_works_on_two_ranks_and_they_agree() -> None:
    first, second = run_on_ranks(all_pairs_on_rank, 2, timeout=240)
    assert first == second and len(first) == sum(pair_of(*pair).verdict != "refused" for pair in ALL)
