"""W&B without network, and what it wrote."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """W&B without network, and without a run left over for the next test."""
    torch.set_num_threads(1)  # as for every test, but before the first recipe runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        wandb.finish()
        yield
        wandb.finish()
        wandb.teardown()


def records(folder: Path) -> list[dict[str, Any]]:
    """Every record of an offline W&B run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


def wandb_runs(folder: Path) -> dict[str, str]:
    """Name of each W&B run -> all its records as one text."""
    runs = {}
    for run in sorted((folder / "wandb").glob("offline-run-*")):
        found = records(run)
        (name,) = {r["run"]["display_name"] for r in found if "run" in r and r["run"].get("display_name")}
        runs[name] = "\n".join(json.dumps(record) for record in found)
    return runs
