"""Every value of every argument of every callback survives LightningCLI, and wrong ones are refused by name."""

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

import lightning_bn as lbn

CALLBACKS = [name for name in lbn.__all__ if name.endswith(("Callback", "Monitor"))]
NAMES = [*CALLBACKS, "PassConfig", "FromLoader", "Replay"]
REQUIRED = ["DomainSpecificBNCallback", "RoIShuffleCallback"]
NEEDED: dict[str, dict[str, Any]] = {
    "FreezeBNCallback": {"start_epoch": 1},
    "GhostBNCallback": {"size": 2},
    "DomainSpecificBNCallback": {"num_domains": 2},
    "RoIShuffleCallback": {"modules": "bn*"},
    "FromLoader": {"fn": iter},
}
ONE_OF = {"last_n_epochs", "start_epoch", "start_step", "start_fraction", "size", "splits"}


def arguments() -> Iterator[tuple[str, str]]:
    return ((name, argument) for name in NAMES for argument in inspect.signature(getattr(lbn, name)).parameters)


@pytest.mark.parametrize(("name", "argument"), [*arguments()])
def test_an_object_of_another_kind_is_refused_by_the_arguments_name(name: str, argument: str) -> None:
    needed = {k: v for k, v in NEEDED.get(name, {}).items() if not {k, argument} <= ONE_OF}
    with pytest.raises((TypeError, ValueError), match=rf"^(\w+: )?{argument} must (be|map) .*but is <object"):
        getattr(lbn, name)(**needed | {argument: object()})


def numbers(trainer: Trainer) -> list[Any]:
    return []


OUT_OF_RANGE: list[tuple[str, dict[str, Any], str]] = [
    ("PreciseBN", {"num_samples": 2.5}, "num_samples must be a whole number"),
    ("PreciseBN", {"num_samples": 0}, "num_samples must be at least 1 but is 0"),
    ("PreciseBN", {"every_n_validations": 0}, "every_n_validations must be at least 1 but is 0"),
    ("PreciseBN", {"source": "val_dataloader"}, "source must be .* but is 'val_dataloader'"),
    ("PreciseBN", {"source": numbers}, r"source=FromLoader\(numbers\)"),
    ("PreciseBN", {"forward": "validation_step"}, "forward must be .* but is 'validation_step'"),
    ("PreciseBN", {"stages": ["fit"]}, r"stages must be a list .* but is \['fit'\]"),
    ("PreciseBN", {"normalization_batch_size": 0}, "normalization_batch_size must be at least 1"),
    ("PreciseBN", {"normalization_batch_size": "all"}, "normalization_batch_size must be .* but is 'all'"),
    ("PreciseBN", {"tolerance": 0}, "tolerance must be above 0"),
    ("PreciseBN", {"tolerance": 0.1, "normalization_batch_size": "population"}, "leave one of them out"),
    ("PreciseBN", {"memory_limit": 0}, "memory_limit must be at least 1"),
    ("PreciseBN", {"memory_limit": 9, "normalization_batch_size": "loader"}, "leave one of them out"),
    *(("PreciseBN", {"skip_below": x}, "skip_below must be a number") for x in (-1.0, "0.1", float("nan"))),
    ("FreezeBN", {}, "given: none"),
    ("FreezeBN", {"last_n_epochs": 1, "start_step": 3}, "given: last_n_epochs, start_step"),
    ("FreezeBN", {"last_n_epochs": 0}, "last_n_epochs must be at least 1 but is 0"),
    ("FreezeBN", {"start_epoch": -1}, "start_epoch must be at least 0 but is -1"),
    ("FreezeBN", {"start_step": -1}, "start_step must be at least 0 but is -1"),
    *(("FreezeBN", {"start_fraction": x}, f"start_fraction must be .* but is {x}") for x in (1.0, -0.1)),
    ("FreezeBN", {"start_epoch": 1, "statistics": "exact"}, "'exact'"),
    ("FreezeBN", {"start_epoch": 1, "warmup_epochs": -1}, "warmup_epochs must be .* but is -1"),
    ("FreezeBN", {"start_epoch": 1, "warmup_steps": -1}, "warmup_steps must be at least 0 but is -1"),
    *(("BatchLeakage", {"alpha": alpha}, "alpha must be") for alpha in (0, 2.0)),
    ("BatchLeakage", {"num_samples": 0}, "num_samples must be at least 1"),
    ("BatchLeakage", {"same_pattern": numbers}, "same_pattern is for log_errors=True"),
    ("BatchLeakage", {"log_errors": True, "same_pattern": "x"}, "same_pattern must be a function .* but is 'x'"),
    ("BNStats", {"every_n_batches": 0}, "^every_n_batches"),
    *(("BNStats", {"quantities": names}, "^quantities") for names in (["drift"], "lag")),
    *(("BNStats", {"alert_threshold": sigma}, "^alert_threshold") for sigma in (-1.0, True)),
    *(("BNStats", {"trace_channels": channels}, "^trace_channels") for channels in ({}, {"bn1": -1})),
    ("DomainSpecificBN", {"num_domains": 1}, "num_domains must be at least 2"),
    ("DomainSpecificBN", {"num_domains": 2, "train_statistics": "each"}, "must be 'shared' or 'domain'"),
    ("DomainSpecificBN", {"num_domains": 2, "level_modules": "head", "domain_fn": len}, "pass one of them"),
    ("GhostBN", {}, "either size= or splits="),
    ("SyncBN", {"group_size": 0}, "group_size must be"),
    *(("RoIShuffle", {"modules": m}, "modules must be a glob pattern over") for m in (None, "", [], ["bn1", None])),
    ("RoIShuffle", {"modules": "bn1", "seed": -1}, "seed must be"),
    ("RoIShuffle", {"modules": "bn1", "seed": 2**64}, "seed must be below"),
    ("AdaBN", {"num_samples": 0}, "num_samples must be"),
    ("AdaBN", {"prior_samples": -1}, "prior_samples must be"),
    ("AdaBN", {"forward": "training_step"}, "forward must be"),
    *(("MiniBatchInference", {"stages": s}, "stages must be a list of") for s in (["fit"], "test", None)),
    ("MiniBatchInference", {"layers": []}, "layers must be"),
    ("Replay", {"max_bytes": 0}, "max_bytes must be at least 1 but is 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), OUT_OF_RANGE)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(name: str, options: dict[str, Any], message: str) -> None:
    cls = next(getattr(lbn, name + end) for end in ("Callback", "Monitor", "") if hasattr(lbn, name + end))
    with pytest.raises((TypeError, ValueError), match=message):
        cls(**options)


EXAMPLES: dict[Any, list[Any]] = {NoneType: [None], bool: [True, False], int: [3], float: [0.25], str: ["bn*"]}


def bare(batch):  # type: ignore[no-untyped-def]  # as people write it
    return batch["dataset"]


def bare_of_two(module, batch):  # type: ignore[no-untyped-def]
    return module(batch)


def either(batch: Any) -> int | Tensor:
    return len(batch)


def tensor(batch: Any) -> Tensor:
    return torch.as_tensor(batch["dataset"])


FUNCTIONS: dict[str, list[Callable[..., Any]]] = {
    "batch_size_fn": [bare, either],
    "domain_fn": [bare, either, tensor],
    "forward": [bare_of_two],
    "fn": [bare, numbers],
    "same_pattern": [bare, numbers],
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


def values() -> Iterator[Any]:
    for name, argument in arguments():
        if name in CALLBACKS:
            for value in values_of(get_type_hints(getattr(lbn, name).__init__)[argument], argument):
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


@pytest.mark.parametrize(("callback", "argument", "value"), [*values()])
def test_every_value_survives_the_command_line_both_ways(callback: str, argument: str, value: Any, parser: Any) -> None:
    needed = NEEDED.get(callback, {}) if argument == "precise" or callback in REQUIRED else {}
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
