"""The house has floors, and what is above is not needed below."""

from __future__ import annotations

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
    foreign = {
        file: names
        for file in FILES
        if folder_of(file) in LIGHTNING and file != COMPAT and (names := private_names(file) - OURS)
    }
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
        (
            trainer.validate_loop,
            "_build_kwargs _build_step_args_from_hook_kwargs _combined_loader _module_mode _results",
        ),
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
