"""Every value of every argument of every callback survives LightningCLI: parsed, saved, and read back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
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

EXAMPLES: dict[Any, list[Any]] = {
    NoneType: [None],
    bool: [True, False],
    int: [3],
    float: [0.25],
    str: ["bn*"],
}


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
    "same_pattern": [bare, loader],
    "source": [bare, loader],
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
    else:
        yield from EXAMPLES[annotation]


def arguments() -> Iterator[Any]:
    for name in lightning_bn.__all__:
        if name.endswith(("Callback", "Monitor")):
            init = getattr(lightning_bn, name).__init__
            hints = get_type_hints(init)
            for argument in list(inspect.signature(init).parameters)[1:]:
                for value in values_of(hints[argument], argument):
                    said = value.__name__ if callable(value) else str(value)
                    yield pytest.param(name, argument, value, id=f"{name}-{argument}-{said}")


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)  # as LightningCLI adds those of the Trainer
    return parser


@pytest.mark.parametrize(("callback", "argument", "value"), [*arguments()])
def test_every_value_survives_the_command_line_both_ways(
    callback: str, argument: str, value: Any, parser: ArgumentParser
) -> None:
    written = f"{__name__}.{value.__name__}" if callable(value) else value
    signature = inspect.signature(getattr(lightning_bn, callback))
    needed = {name: 2 for name, p in signature.parameters.items() if p.default is p.empty}  # domains, modules
    needed = {name: "*" if name == "modules" else number for name, number in needed.items()}
    given = {"class_path": f"lightning_bn.{callback}", "init_args": needed | {argument: written}}
    parsed = parser.parse_string(yaml.safe_dump({"callback": given}))
    saved = parser.dump(parsed, skip_unset=False)  # as LightningCLI does
    assert yaml.safe_load(saved)["callback"]["init_args"][argument] == written
    for config in (parsed, parser.parse_string(saved)):
        read = config.callback.init_args[argument]
        assert (read, type(read)) == (value, type(value))
