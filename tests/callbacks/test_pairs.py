"""Every pair of callbacks on one layer does what the table of the docs says."""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

import lightning_bn as lbn
from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.callbacks.pairs import PAIRS, as_markdown, compatibility
from lightning_bn.layers.behavior import behaviors_of
from tests.callbacks.zoo import TinyNet, digest, fit, train_loader, val_loader
from tests.ranks import run_on_ranks

MAKE: dict[str, Callable[[], Any]] = {
    "PreciseBNCallback": functools.partial(lbn.PreciseBNCallback, 20),
    "FreezeBNCallback": functools.partial(lbn.FreezeBNCallback, start_epoch=1, num_samples=20, warmup_epochs=0),
    "MiniBatchInferenceCallback": lbn.MiniBatchInferenceCallback,
    "AdaBNCallback": lbn.AdaBNCallback,
    "GhostBNCallback": functools.partial(lbn.GhostBNCallback, size=4),
    "SyncBNCallback": lbn.SyncBNCallback,
    "DomainSpecificBNCallback": functools.partial(lbn.DomainSpecificBNCallback, 3, domain_fn=operator.itemgetter(1)),
    "RoIShuffleCallback": functools.partial(lbn.RoIShuffleCallback, modules="bn*"),
    "BNStatsMonitor": functools.partial(lbn.BNStatsMonitor, 1, 2),
    "BatchLeakageMonitor": functools.partial(lbn.BatchLeakageMonitor, 32),
}
ALL = [tuple(sorted(pair)) for pair in PAIRS]


def train_and_test(first: str, second: str, **trainer: Any) -> LightningModule:
    """Fit and test a module with both callbacks on all of its layers."""
    module = TinyNet()
    fitted = fit(module, [MAKE[first](), MAKE[second]()], train_loader(48, 8, shuffle=True), **trainer)
    fitted.test(module, val_loader(), verbose=False)
    return module


def assert_plain(module: LightningModule) -> None:
    """Nothing is left in the module, and what it learnt is all there."""
    assert all(type(m) is type(p) for m, p in zip(module.modules(), TinyNet().modules(), strict=True))
    assert not any(behaviors_of(m) for m in module.modules())
    assert TinyNet().load_state_dict(module.state_dict(), strict=True)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_the_table_has_every_pair_of_every_callback() -> None:
    callbacks = {
        name
        for name in lbn.__all__
        if issubclass(type(c := getattr(lbn, name)), type) and issubclass(c, BatchNormCallback)
    }
    assert callbacks == set(MAKE)
    assert set(PAIRS) == {frozenset(pair) for pair in itertools.combinations(callbacks, 2)}


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize(("first", "second"), ALL)
def test_a_pair_does_what_the_table_says(first: str, second: str, swapped: bool) -> None:
    verdict, why = PAIRS[frozenset((first, second))]
    if swapped:
        first, second = second, first
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if verdict == "refused":
            with pytest.raises(ValueError, match=why):
                train_and_test(first, second)
            return
        module = train_and_test(first, second)
    assert_plain(module)
    assert any("77.9 to 48.5" in str(w.message) for w in caught) == (verdict == "warns")


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("other", [name for name in MAKE if name != "BNStatsMonitor"])
def test_beside_the_monitor_training_is_bit_for_bit_what_it_is_without(other: str) -> None:
    modules = TinyNet(0.5), TinyNet(0.5)
    fit(modules[0], [MAKE["BNStatsMonitor"](), MAKE[other]()], train_loader(48, 8, shuffle=True))
    fit(modules[1], MAKE[other](), train_loader(48, 8, shuffle=True))
    assert digest(modules[0].state_dict()) == digest(modules[1].state_dict())


def test_a_pair_that_is_refused_works_on_different_layers() -> None:
    callbacks = [lbn.GhostBNCallback(size=4, layers="bn1"), lbn.SyncBNCallback(layers="bn2")]
    module = TinyNet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, callbacks)
    assert_plain(module)


def test_a_callback_of_the_users_counts_as_the_one_it_is_derived_from() -> None:
    class Own(lbn.GhostBNCallback):
        pass

    pair = compatibility(Own, lbn.SyncBNCallback)
    assert pair is not None and pair.verdict == "refused"
    with pytest.raises(ValueError, match="Own and SyncBNCallback"):
        fit(TinyNet(), [Own(size=4), lbn.SyncBNCallback()])


def test_the_docs_have_the_table_as_it_is() -> None:
    page = Path(__file__).parents[2] / "docs" / "callbacks" / "pairs.md"
    assert as_markdown() in page.read_text(encoding="utf-8")


def all_pairs_on_rank(world_size: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found = {}
    for first, second in ALL:
        if PAIRS[frozenset((first, second))].verdict != "refused":
            module = train_and_test(first, second, devices=world_size, strategy="ddp")
            assert_plain(module)
            found[f"{first}, {second}"] = digest(dict(module.named_parameters()))
    return found


@pytest.mark.ddp
def test_every_pair_works_on_two_ranks_and_they_agree() -> None:
    torch.set_num_threads(1)
    first, second = run_on_ranks(all_pairs_on_rank, 2, 2, timeout=240)
    assert first == second and len(first) == sum(pair.verdict != "refused" for pair in PAIRS.values())
