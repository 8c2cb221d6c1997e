"""The house has floors, and what is above is not needed below."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning.pytorch.overrides import distributed
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import BatchSampler, SequentialSampler

import lightning_bn

ROOT = Path(str(lightning_bn.__file__)).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
del FILES["__init__.py"]  # it names all

FLOORS = [{"lazy"}, {"core"}, {"layers"}, {"lockstep"}, {"functional"}, {"tracking"}, {"trainer", "plots"}]
FLOORS += [{"callbacks", "report"}]
"""A file imports from its own folder, and from those on lower floors."""
LIGHTNING = {"trainer", "plots", "callbacks", "report"}
"""Who may import Lightning."""
COMPAT = "trainer/compat.py"
TORCH_PRIVATE = {"_version", "_cdata", "_parameters", "_buffers", "_modules", "_get_iterator"}
"""Private names of torch that the folders above use."""


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


TOO_LONG = {"functional/domain/bn.py:domain_bn", "functional/measure.py:measure"}
"""Files of more than 300 lines, and functions of more than 40 lines of code: to be emptied."""
TOO_MANY_PARAMETERS = {
    "functional/measure.py:measure",
    "layers/override.py:_of_torch",  # has the parameters of torch.batch_norm
    "plots/drift.py:drift_overview",  # public in lightning_bn.plots
}
"""Private functions of more than 6 parameters. Public ones have their rule in test_public_face.py."""
DOCS = [*(ROOT.parent / "docs").rglob("*.md"), ROOT.parent / "README.md", ROOT.parent / "CHANGELOG.md"]
UNPLAIN = r"nobody|told|lent|anew|afresh|mend(s|ed|ing)?|whoever|(normal|initial|summar)is(e|ed|es|ing)|behaviours?"
"""Words that were a language of our own, and spellings that torch does not use."""


@pytest.mark.parametrize("path", [*FILES.values(), *DOCS], ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_words_are_plain_and_spelled_as_in_torch(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [found[0] for found in re.finditer(rf"\b({UNPLAIN})\b", text, re.IGNORECASE)]


def test_the_glossary_has_at_most_forty_words() -> None:
    rows = re.findall(r"^\| .* \|$", (ROOT.parent / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert 0 < len(rows) - 1 <= 40


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short_and_private_functions_have_few_parameters(file: str) -> None:
    text = FILES[file].read_text(encoding="utf-8")
    length = len(text.splitlines())
    assert length <= 300 or file in TOO_LONG, f"{length} lines"
    public = {name for name in lightning_bn.__all__ if name in text}
    for name, function, source in functions_of(file):
        assert lines_of_code(function, source) <= 40 or f"{file}:{name}" in TOO_LONG, name
        if name.removesuffix(".__init__") not in public and f"{file}:{name}" not in TOO_MANY_PARAMETERS:
            assert number_of_parameters(function) <= 6, name


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_from_its_own_folder_and_lower_floors(file: str) -> None:
    own = folder_of(file)
    (floor,) = (i for i, folders in enumerate(FLOORS) if own in folders)
    modules = {tuple(module.split(".")) for module in imported(FILES[file])}
    ours = {parts[1] for parts in modules if parts[0] == "lightning_bn"}
    assert ours <= {own}.union(*FLOORS[:floor])
    assert own in LIGHTNING or not [parts for parts in modules if "lightning" in parts[0].replace("lightning_bn", "")]


def private_names(file: str) -> set[str]:
    """Private attributes that a file uses, of any object, and all that it names in strings, for getattr and hasattr."""
    nodes = list(ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    found = attributes | (strings if file == COMPAT else strings & LIGHTNING_PRIVATE)
    return {name for name in found if re.fullmatch(r"_[a-zA-Z]\w*", name)}


def defined_names(file: str) -> Iterator[str]:
    """Names of functions, classes, variables and own attributes that a file defines."""
    for node in ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


OURS = {name for file in FILES for name in defined_names(file)} | TORCH_PRIVATE
LIGHTNING_PRIVATE = private_names(COMPAT) - OURS


def test_private_names_of_lightning_are_in_compat_alone() -> None:
    files = [file for file in FILES if folder_of(file) in LIGHTNING and file != COMPAT]
    foreign = {file: names for file in files if (names := private_names(file) - OURS)}
    assert not foreign, f"private names of other packages belong in {COMPAT}"


def test_the_installed_lightning_has_the_private_names() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    averaging = getattr(callbacks, "WeightAveraging", None)  # since Lightning 2.6
    loader = CombinedLoader([[0]], "sequential")
    sampler = _IndexBatchSamplerWrapper(BatchSampler(SequentialSampler([0]), 1, False))
    owners: list[tuple[Any, str]] = [
        (trainer, "_active_loop _logger_connector"),
        (trainer.fit_loop, "_combined_loader _data_fetcher _should_accumulate"),
        (trainer.fit_loop.epoch_loop, "_batches_that_stepped _results _should_check_val_fx"),
        (trainer.validate_loop, "_build_kwargs _build_step_args_from_hook_kwargs _combined_loader"),
        (trainer.validate_loop, "_module_mode _results"),
        (trainer._logger_connector, "_callback_metrics _current_fx _evaluation_epoch_end _first_loop_iter"),
        (trainer._logger_connector, "_logged_metrics _progress_bar_metrics"),
        (call, "_call_lightning_module_hook"),
        (loader, "_mode"),
        (sampler, "_batch_sampler"),
        (distributed, "_IndexBatchSamplerWrapper"),
        (LightningModule, "_on_before_batch_transfer"),
        (callbacks.Callback, "_generate_state_key"),
        (callbacks.RichProgressBar, "_add_task"),
        (averaging() if averaging else None, "_average_model _swap_models"),
    ]
    missing = [n for owner, names in owners if owner is not None for n in names.split() if not hasattr(owner, n)]
    assert not missing, f"Lightning {lightning.__version__} lacks these: change {COMPAT}"
    assert {name for _, names in owners for name in names.split()} >= LIGHTNING_PRIVATE
