"""Search for BatchNorm layers by qualified name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

Layers: TypeAlias = str | Sequence[str] | None
"""Glob patterns over qualified layer names, such as ``"roi_heads.*"``; None for every BatchNorm layer."""


def find_bn(model: nn.Module, layers: Layers = None) -> dict[str, _BatchNorm]:
    """Find the BatchNorm layers of a model: `BatchNorm1d/2d/3d`, `SyncBatchNorm` and their subclasses.

    Args:
        model: Any module.
        layers: Glob pattern or patterns over qualified names, such as ``"backbone.*"``; None for every layer.

    Returns:
        Qualified name -> layer, in the order of ``model.named_modules()``; a shared layer under its first name.

    Raises:
        ValueError: If there is no BatchNorm layer, if a pattern matches none, or if a lazy layer is not initialized.

    Example:
        >>> from torch import nn
        >>> from lightning_bn import find_bn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(8)))
        >>> list(find_bn(model)), list(find_bn(model, "2.*"))
        (['1', '2.0'], ['2.0'])
    """
    every = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not every:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm layer (BatchNorm1d/2d/3d, SyncBatchNorm or a subclass)."
        )
    found = every
    if layers is not None:
        names = match_names(every, as_patterns(layers), "layers", f"BatchNorm layer of {type(model).__name__}")
        found = {name: every[name] for name in names}
    for name, layer in found.items():
        if isinstance(layer, _LazyNormBase) and layer.has_uninitialized_params():
            raise ValueError(f"Layer {name!r} is lazy and not initialized: run one forward before lightning_bn.")
    return found


def find_modules(model: nn.Module, modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """Find modules by qualified name, without those inside another match."""
    every = {name: m for name, m in model.named_modules() if name}
    names = match_names(every, as_patterns(modules, "modules"), "modules", f"module of {type(model).__name__}")
    return {name: every[name] for name in names if not any(name.startswith(f"{outer}.") for outer in names)}


def changeable_layers(model: nn.Module, layers: Layers = None) -> dict[str, _BatchNorm]:
    """Find BatchNorm layers that can get a behavior; raise if one has a ``forward`` on the instance."""
    found = find_bn(model, layers)
    for name, layer in found.items():
        if "forward" in vars(layer):
            raise ValueError(
                f"Layer {name!r} has a forward set on the instance, so its class cannot change it. Leave it out by "
                "layers=, or define the forward in its class."
            )
    return found


def storing_layers(model: nn.Module, layers: Layers = None) -> dict[str, _BatchNorm]:
    """Find changeable layers with running statistics; raise if ``layers`` chooses one without."""
    found = changeable_layers(model, layers)
    without = [name for name, layer in found.items() if layer.running_mean is None or layer.running_var is None]
    if without and (layers is not None or len(without) == len(found)):
        raise ValueError(f"{', '.join(without)}: track_running_stats=False, so there are no population statistics.")
    return {name: layer for name, layer in found.items() if name not in without}


def as_patterns(given: Layers, option: str = "layers") -> tuple[str, ...]:
    """Return the glob patterns of an argument; for ``layers``, None stands for every layer."""
    if given is None and option == "layers":
        return ("*",)
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise TypeError(f"{option} must be a glob pattern over qualified names, or a list of them, but is {given!r}.")
    return tuple(patterns)


def match_names(names: Iterable[str], patterns: Sequence[str], option: str, kind: str) -> list[str]:
    """Return the names that match any of the glob patterns; raise if a pattern matches none."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            inside = any(name.startswith(f"{pattern}.") for name in names)
            hint = f"Did you mean {pattern + '.*'!r}? " if inside else ""
            raise ValueError(f"{option}={pattern!r} matches no {kind}. {hint}There are: {', '.join(names)}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
