"""Every value of every argument of every callback survives LightningCLI: parsed, saved, and read back."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_bn

EXAMPLES: dict[Any, list[Any]] = {NoneType: [None], bool: [True, False], int: [3], float: [0.25], str: ["bn*"]}


# Functions as people write them, with and without annotations.
def bare(batch):  # type: ignore[no-untyped-def]
    return batch["dataset"]


def bare_of_two(module, batch):  # type: ignore[no-untyped-def]
    return module(batch)


def whole(batch: Any) -> int:
    return len(batch)


def either(batch: Any) -> int | Tensor:
    return len(batch)


def tensor(batch: Any) -> Tensor:
    return torch.as_tensor(batch["dataset"])


def loader(trainer: Trainer) -> DataLoader[Any]:
    return trainer.datamodule.train_dataloader()


FUNCTIONS: dict[str, list[Callable[..., Any]]] = {
    "batch_size_fn": [bare, whole],
    "domain_fn": [bare, whole, either, tensor],
    "forward": [bare_of_two],
    "fn": [bare, loader],
    "same_pattern": [bare, loader],
}
"""Name of an argument -> functions that it takes."""


def values_of(annotation: Any, name: str) -> Iterator[Any]:
    """An example of each type that an annotation allows, and each value of its literals."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for kind in inner:
            yield from values_of(kind, name)
    elif origin is Literal:
        yield from inner
    elif origin is Sequence:
        yield list(values_of(inner[0], name))
    elif origin is dict:
        yield {key: value for key in values_of(inner[0], name) for value in values_of(inner[1], name)}
    elif origin is Callable:
        yield from FUNCTIONS[name]
    elif is_dataclass(annotation):
        hints = get_type_hints(annotation)
        needed = {f.name: FUNCTIONS[f.name][0] for f in fields(annotation) if f.default is MISSING}
        for field in fields(annotation):
            for value in values_of(hints[field.name], field.name):
                yield annotation(**(needed | {field.name: value}))  # type: ignore[operator]
    else:
        yield from EXAMPLES[annotation]


def arguments() -> Iterator[Any]:
    for name in lightning_bn.__all__:
        if name.endswith(("Callback", "Monitor")):
            init = getattr(lightning_bn, name).__init__
            hints = get_type_hints(init)
            for argument in list(inspect.signature(init).parameters)[1:]:
                for value in values_of(hints[argument], argument):
                    text = value.__name__ if callable(value) else re.sub(r"<function (\w+) at \w+>", r"\1", str(value))
                    yield pytest.param(name, argument, value, id=f"{name}-{argument}-{text}")


def written(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: written(getattr(value, f.name)) for f in fields(value)}
    return f"{__name__}.{value.__name__}" if callable(value) else value


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)  # as LightningCLI adds those of the Trainer
    return parser


@pytest.mark.parametrize(("callback", "argument", "value"), [*arguments()])
def test_every_value_survives_the_command_line_both_ways(callback: str, argument: str, value: Any, parser: Any) -> None:
    signature = inspect.signature(getattr(lightning_bn, callback))
    required = [name for name, p in signature.parameters.items() if p.default is p.empty]  # domains, modules
    needed: dict[str, Any] = {name: "*" if name == "modules" else 2 for name in required}
    if argument == "precise":  # is instantiated below
        needed["start_epoch"] = 1
    given = {"class_path": f"lightning_bn.{callback}", "init_args": needed | {argument: written(value)}}
    parsed = parser.parse_string(yaml.safe_dump({"callback": given}))
    saved = parser.dump(parsed, skip_unset=False)  # as LightningCLI does
    assert yaml.safe_load(saved)["callback"]["init_args"][argument] == written(value)
    for config in (parsed, parser.parse_string(saved)):
        read = config.callback.init_args[argument]
        if is_dataclass(value):
            made = parser.instantiate_classes(config).callback
            assert value in (vars(made).get(argument), getattr(getattr(made, "config", None), argument, None))
        else:
            assert (read, type(read)) == (value, type(value))
