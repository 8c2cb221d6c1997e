"""Wrong arguments of callbacks are refused at construction, by name and with what is allowed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import lightning_bn as lbn

NAMES = [name for name in lbn.__all__ if name.endswith(("Callback", "Monitor"))] + [
    "PassConfig",
    "FromLoader",
    "Replay",
]
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


@pytest.mark.parametrize(("name", "argument"), arguments())
def test_an_object_of_another_kind_is_refused_by_the_arguments_name(name: str, argument: str) -> None:
    needed = {k: v for k, v in NEEDED.get(name, {}).items() if not {k, argument} <= ONE_OF}
    with pytest.raises((TypeError, ValueError), match=rf"^(\w+: )?{argument} must (be|map) .*but is <object"):
        getattr(lbn, name)(**needed | {argument: object()})


def numbers(trainer: Any) -> list[Any]:
    return []


OUT_OF_RANGE: list[tuple[str, dict[str, Any], str]] = [
    *(("PreciseBN", {"num_samples": n}, "num_samples must be a whole number") for n in (None, 2.5)),
    ("PreciseBN", {"num_samples": 0}, "num_samples must be at least 1 but is 0"),
    ("PreciseBN", {"every_n_validations": 0}, "every_n_validations must be at least 1 but is 0"),
    ("PreciseBN", {"source": "val_dataloader"}, "source must be .* but is 'val_dataloader'"),
    ("PreciseBN", {"source": numbers}, r"source=FromLoader\(numbers\)"),
    ("PreciseBN", {"forward": "validation_step"}, "forward must be .* but is 'validation_step'"),
    ("PreciseBN", {"stages": "validate"}, "stages must be a list .* but is 'validate'"),
    ("PreciseBN", {"stages": ["fit"]}, r"stages must be a list .* but is \['fit'\]"),
    ("PreciseBN", {"normalization_batch_size": 0}, "normalization_batch_size must be at least 1"),
    ("PreciseBN", {"normalization_batch_size": 2.5}, "normalization_batch_size must be a whole number"),
    ("PreciseBN", {"normalization_batch_size": "all"}, "normalization_batch_size must be .* but is 'all'"),
    ("PreciseBN", {"normalization_batch_size": None}, "normalization_batch_size must be .* but is None"),
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
    ("FreezeBN", {"start_epoch": 1, "affine": 0}, "affine must be True or False but is 0"),
    ("FreezeBN", {"start_epoch": 1, "warmup_epochs": -1}, "warmup_epochs must be .* but is -1"),
    ("FreezeBN", {"start_epoch": 1, "warmup_steps": -1}, "warmup_steps must be at least 0 but is -1"),
    *(("BatchLeakage", {"alpha": alpha}, "alpha must be") for alpha in (0, 2.0)),
    ("BatchLeakage", {"num_samples": 0}, "num_samples must be at least 1"),
    ("BatchLeakage", {"same_pattern": numbers}, "same_pattern is for log_errors=True"),
    ("BatchLeakage", {"log_errors": True, "same_pattern": "x"}, "same_pattern must be a function .* but is 'x'"),
    ("BNStats", {"every_n_batches": 0}, "^every_n_batches"),
    ("BNStats", {"window": 1.5}, "^window"),
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
    ("PassConfig", {"source": numbers}, r"source=FromLoader\(numbers\)"),
    ("Replay", {"max_bytes": 0}, "max_bytes must be at least 1 but is 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), OUT_OF_RANGE)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(name: str, options: dict[str, Any], message: str) -> None:
    cls = next(getattr(lbn, name + end) for end in ("Callback", "Monitor", "") if hasattr(lbn, name + end))
    with pytest.raises((TypeError, ValueError), match=message):
        cls(**options)
