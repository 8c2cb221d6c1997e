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


def functions_of(file: str) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Qualified name, definition and source of every function, those within functions excluded."""
    source = FILES[file].read_text(encoding="utf-8")

    def within(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from within(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                yield f"{prefix}{node.name}", node, source

    return within(ast.parse(source).body, "")


def lines_of_code(function: ast.FunctionDef, source: str) -> int:
    """Lines of a function without decorators, docstring, comments and blank lines."""
    lines = source.splitlines()
    rows = set(range(function.lineno, (function.end_lineno or 0) + 1))
    if ast.get_docstring(function):
        rows -= set(range(function.body[0].lineno, (function.body[0].end_lineno or 0) + 1))
    return sum(bool(lines[row - 1].strip()) and not lines[row - 1].strip().startswith("#") for row in rows)


def number_of_parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(set(names) - {"self", "cls", "ctx"})


TOO_LONG = {
    "callbacks/bn_stats_monitor.py",
    "callbacks/domain_specific_bn.py",
    "callbacks/freeze_bn.py",
    "callbacks/freeze_bn.py:FreezeBNCallback.__init__",
    "callbacks/precise_bn.py",
    "callbacks/precise_bn.py:PreciseBNCallback.__init__",
    "functional/domain/bn.py",
    "functional/domain/bn.py:domain_bn",
    "functional/domain/levels.py",
    "functional/domain/specific.py",
    "functional/measure.py",
    "functional/measure.py:measure",
    "lockstep/pooled.py",
    "plots/drift.py",
    "plots/drift.py:_draw_lag_against_noise",
    "trainer/loaders.py",
    "trainer/passes.py",
    "trainer/target_pass.py:measure_target",
}
"""Files of more than 300 lines, and functions of more than 40 lines of code: to be emptied."""
TOO_MANY_PARAMETERS = {
    "functional/measure.py:measure",
    "functional/precise.py:measure_model",
    "layers/batch_mode.py:forward_with_buffers",
    "layers/override.py:_of_torch",
    "lockstep/pooled.py:PooledForward.__init__",
    "plots/drift.py:drift_overview",
    "tracking/trusted.py:_differs",
    "trainer/target_pass.py:measure_target",
}
"""Private functions of more than 6 parameters: to be emptied. Public ones have their rule in test_public_face.py."""


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short(file: str) -> None:
    length = len(FILES[file].read_text(encoding="utf-8").splitlines())
    assert length <= 300 or file in TOO_LONG, f"{length} lines"
    long = {name: lines_of_code(*function) for name, *function in functions_of(file)}
    assert not {n: lines for n, lines in long.items() if lines > 40 and f"{file}:{n}" not in TOO_LONG}


@pytest.mark.parametrize("file", FILES)
def test_private_functions_have_few_parameters(file: str) -> None:
    public = {name for name in lightning_bn.__all__ if name in FILES[file].read_text(encoding="utf-8")}
    many = {name: number_of_parameters(function) for name, function, _ in functions_of(file)}
    for name, number in many.items():
        if name.removesuffix(".__init__") not in public and f"{file}:{name}" not in TOO_MANY_PARAMETERS:
            assert number <= 6, name


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
