"""What every test gets: one thread, a seed; and for those that ask, W&B without a network."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from hypothesis import settings
from lightning.fabric.utilities import registry

from tests.ranks import end_ranks, start_anew

settings.register_profile("suite", deadline=None, derandomize=True, database=None)  # the same examples, on any machine
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _anew() -> None:
    start_anew()


@pytest.fixture(scope="session", autouse=True)
def _plugins_are_looked_up_once() -> Iterator[None]:
    """A Trainer reads the metadata of every installed package, which takes a tenth of a tiny fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_ranks_left() -> Iterator[None]:
    yield
    end_ranks()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B without network, without a run left over, and with nothing written outside of the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    wandb.finish()
    yield
    wandb.finish()
    wandb.teardown()
