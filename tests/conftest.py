"""What every test gets: one thread, a seed; and for those that ask, W&B without a network."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wandb
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, database=None)  # the same examples, on any machine
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)  # the suite runs on two cores, ranks of DDP tests included
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # all compiled models of one process share a limit of recompilations
        torch._dynamo.reset()


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
