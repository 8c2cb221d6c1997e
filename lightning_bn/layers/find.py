"""Finding the BatchNorm layers of a model by qualified name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

Layers: TypeAlias = str | Sequence[str] | None
"""Glob patterns over qualified layer names, such as ``"roi_heads.*"``; None for every BatchNorm layer."""


def find_bn(model: nn.Module, layers: Layers = None) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of a model: `BatchNorm1d/2d/3d`, `SyncBatchNorm` and their subclasses.

    Args:
        model: Any module. A layer that is registered under several names is listed under the first.
        layers: Glob pattern or patterns over qualified names (``"backbone.*"``, ``"*.bn1"``). None takes every layer.

    Returns:
        Qualified name -> layer, in the order of ``model.named_modules()``.

    Raises:
        ValueError: If there is no BatchNorm layer, if a pattern matches none, or if a lazy layer has not yet seen data.

    Example:
        >>> from torch import nn
        >>> from lightning_bn import find_bn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(8)))
        >>> list(find_bn(model)), list(find_bn(model, "2.*"))
        (['1', '2.0'], ['2.0'])
    """
    everything = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not everything:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm layer (BatchNorm1d/2d/3d, SyncBatchNorm or a subclass)."
        )
    of = f"BatchNorm layer of {type(model).__name__}"
    names = everything if layers is None else chosen(everything, as_patterns(layers), "layers", of)
    found = {name: everything[name] for name in names}
    for name, layer in found.items():
        if isinstance(layer, _LazyNormBase) and layer.has_uninitialized_params():
            raise ValueError(f"Layer {name!r} is lazy and has not seen data: run one forward before lightning_bn.")
    return found


def chosen(names: Iterable[str], patterns: Sequence[str], option: str, of: str) -> list[str]:
    """Those of ``names`` that match any of the glob patterns, in their own order.

    Raises:
        ValueError: If a pattern of that ``option`` matches no name, of which the message says what they are the names
            ``of``.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{option}={pattern!r} matches no {of}. There are: {', '.join(names)}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def find_modules(model: nn.Module, modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a model, itself excluded, whose qualified names match; of those within each other the outermost.

    Raises:
        ValueError: If a pattern matches none.
    """
    everything = {name: m for name, m in model.named_modules() if name}
    names = chosen(everything, as_patterns(modules, "modules"), "modules", f"module of {type(model).__name__}")
    return {name: everything[name] for name in names if not any(name.startswith(f"{outer}.") for outer in names)}


def as_patterns(given: Layers, option: str = "layers") -> tuple[str, ...]:
    """The patterns that an ``option`` was given; None stands for every layer, and for no other thing.

    Raises:
        TypeError: If it is no pattern, nor a list of some.
    """
    if given is None and option == "layers":
        return ("*",)
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise TypeError(f"{option} must be a glob pattern over qualified names, or a list of some, but is {given!r}.")
    return tuple(patterns)


def changeable_layers(model: nn.Module, layers: Layers = None) -> dict[str, _BatchNorm]:
    """Those found by `find_bn`, if all of them can be given a behavior.

    Raises:
        ValueError: If a layer's forward was replaced on the instance.
    """
    found = find_bn(model, layers)
    patched = [name for name, layer in found.items() if "forward" in vars(layer)]
    if patched:
        raise ValueError(
            f"Layer {patched[0]!r} has a forward set on the instance, which goes round anything its class could do "
            "differently: lightning_bn cannot act on it."
        )
    return found


def storing_layers(model: nn.Module, layers: Layers = None) -> dict[str, _BatchNorm]:
    """Those of `changeable_layers` that store population statistics.

    Raises:
        ValueError: If a layer chosen by ``layers`` stores none (``track_running_stats=False``), or if no layer does.
    """
    found = changeable_layers(model, layers)
    without = [name for name, layer in found.items() if layer.running_mean is None or layer.running_var is None]
    if without and (layers is not None or len(without) == len(found)):
        raise ValueError(f"{', '.join(without)}: track_running_stats=False, so there are no population statistics.")
    return {name: layer for name, layer in found.items() if name not in without}
