"""A recipe's command, in a new process that has imported lightning_bn already."""

import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.ranks import in_a_fresh_process


def run_command(recipe: str, arguments: list[str], out: Path) -> tuple[str, str]:
    """Runs ``python -m recipes.`` with ``--out``; returns what it wrote to stdout and stderr."""
    in_a_fresh_process(partial(_run, recipe, [*arguments, "--out", str(out)], dict(os.environ), out), timeout=240)
    return (out / "stdout").read_text(), (out / "stderr").read_text()


def _run(recipe: str, arguments: list[str], environment: dict[str, str], out: Path) -> Any:
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with open(out / name, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [recipe, *arguments]
    runpy.run_module(f"recipes.{recipe}", run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
