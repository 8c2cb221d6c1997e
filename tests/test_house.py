"""The house has floors, and what is above is not needed below."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_bn

ROOT = Path(str(lightning_bn.__file__)).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
del FILES["__init__.py"]  # it names all

FLOORS = [{"lazy"}, {"core"}, {"layers"}, {"lockstep"}, {"functional"}, {"tracking"}, {"trainer", "plots"}]
FLOORS += [{"callbacks", "report"}]
"""A file imports from its own folder, and from those on lower floors."""
LIGHTNING = {"trainer", "plots", "callbacks", "report"}
"""Who may import Lightning."""
PRIVATE = (
    r"\._(active_loop|combined_loader|data_fetcher|logger_connector|module_mode|results|batches_that_stepped|"
    r"should_accumulate|should_check_val_fx|build_kwargs|build_step_args_from_hook_kwargs|evaluation_epoch_end|"
    r"on_before_batch_transfer|first_loop_iter|current_fx|callback_connector|data_connector|checkpoint_connector)\b"
)
"""Names of Lightning's that it may change at will."""
KNOW_PRIVATE = {
    "callbacks/domain_specific_bn.py",
    *(f"trainer/{name}.py" for name in ("loaders", "evaluation", "evaluation_loop", "logging", "modes")),
    *(f"trainer/{name}.py" for name in ("normalization_batch", "passes", "resume")),
}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports at any place, for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{name.name}" for name in node.names)


def folder_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_from_its_own_folder_and_lower_floors(file: str) -> None:
    own = folder_of(file)
    (floor,) = (i for i, folders in enumerate(FLOORS) if own in folders)
    modules = {tuple(module.split(".")) for module in imported(FILES[file])}
    ours = {parts[1] for parts in modules if parts[0] == "lightning_bn"}
    assert ours <= {own}.union(*FLOORS[:floor])
    assert own in LIGHTNING or not [parts for parts in modules if "lightning" in parts[0].replace("lightning_bn", "")]


def test_private_names_of_lightning_are_known_to_few() -> None:
    assert {
        file for file, path in FILES.items() if re.search(PRIVATE, path.read_text(encoding="utf-8"))
    } == KNOW_PRIVATE
