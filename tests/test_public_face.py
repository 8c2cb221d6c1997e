"""The public face: signatures change only on purpose, and every type that they return or raise is public.

After a change, `python -m tests.test_public_face` writes the new signatures to public_face.txt.
"""

import builtins
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from torchmetrics import Metric

import lightning_bn
from lightning_bn import Handle

FILE = Path(__file__).with_name("public_face.txt")
PUBLIC = {name: getattr(lightning_bn, name) for name in lightning_bn.__all__ if name != "plots"}
RESULTS = (tuple, Handle, Mapping)
"""What users are given and do not construct; dataclasses, too."""
POSITIONAL = {"DomainSpecificBNCallback.use_domain_of", "Moments.empty", "find_bn"}
"""Exceptions from the rule for arguments: to be emptied."""


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class has of its own, without the hooks of what it is derived from."""
    foreign = {*dir(Callback), *dir(Metric), *dir(tuple), *dir(BaseException)}
    for name in sorted({n for c in cls.__mro__ if c.__module__.startswith("lightning_bn") for n in vars(c)} - foreign):
        if name[0] != "_" and (callable(getattr(cls, name)) or isinstance(getattr(cls, name), property)):
            yield name, inspect.getattr_static(cls, name)


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Everything that can be called: functions, constructors and methods; properties by their getter."""
    for name, thing in PUBLIC.items():
        if isinstance(thing, type) and issubclass(thing, Exception):
            continue
        yield name, thing
        for member, value in members(thing) if isinstance(thing, type) else ():
            value = value.fget if isinstance(value, property) else value
            yield f"{name}.{member}", getattr(value, "__func__", value)


def signatures() -> str:
    lines = dict.fromkeys(PUBLIC, "") | {name: inspect.signature(function) for name, function in functions()}
    return "".join(f"{name}{signature}\n" for name, signature in sorted(lines.items()))


def test_signatures_are_those_on_record() -> None:
    assert signatures().splitlines() == FILE.read_text(encoding="utf-8").splitlines(), "see the top of this file"


@pytest.mark.parametrize(("name", "function"), functions(), ids=lambda value: value if isinstance(value, str) else "")
def test_arguments_are_few_and_keyword_only_and_what_is_returned_or_raised_is_public(
    name: str, function: Callable[..., Any]
) -> None:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    assert len(parameters) <= 11 or name in POSITIONAL
    if not (isinstance(function, type) and (issubclass(function, RESULTS) or dataclasses.is_dataclass(function))):
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        is_hook = positional[:1] == ["trainer"]  # Lightning passes its arguments by position
        assert len(positional) <= 1 or is_hook or positional == ["model", "batches"] or name in POSITIONAL, positional
    annotation = "" if isinstance(function, type) else str(function.__annotations__.get("return"))
    for word in re.findall(r"\w+", annotation):
        returned = getattr(inspect.getmodule(function), word, None)
        ours = isinstance(returned, type) and returned.__module__.startswith("lightning_bn")
        assert not ours or returned in PUBLIC.values(), word
    raised = re.search(r"Raises:\n(.*?)(\n *\n|\Z)", inspect.cleandoc(function.__doc__ or ""), re.DOTALL)
    for error in re.findall(r"^    (\w+):", raised[1], re.MULTILINE) if raised else ():
        assert error in PUBLIC or hasattr(builtins, error)


if __name__ == "__main__":
    FILE.write_text(signatures(), encoding="utf-8")
