"""Statistics and affine of domains, as tensors ``(num_domains, C)`` of a layer.

Statistics are non-persistent buffers, weight and bias are parameters. A copy of a layer keeps them without using them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.checks import check_int
from lightning_bn.layers.behavior import has_behavior

Choice: TypeAlias = Literal["shared", "domain"]
"""One for all domains, or one for each domain."""

OWN_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
STATISTICS = ("domain_mean", "domain_var", "domain_batches")
"""Buffers of domains, in the order of the layer's own."""
AFFINE = ("domain_weight", "domain_bias")
"""Parameters, used instead of ``weight`` and ``bias``."""

State: TypeAlias = "dict[str, dict[str, Tensor]]"
"""Layer name -> name of a tensor -> its values."""


@dataclass(frozen=True)
class Choices:
    """The number of domains, and what they share: a row of the paper's Table 5."""

    num_domains: int
    train_statistics: Choice
    population_statistics: Choice
    affine: Choice

    def __post_init__(self) -> None:
        check_int("num_domains", self.num_domains, at_least=2)
        for name in ("train_statistics", "population_statistics", "affine"):
            choice = getattr(self, name)
            if choice not in get_args(Choice):
                raise ValueError(f"{name} must be 'shared' or 'domain' but is {choice!r}.")


def add_domain_tensors(layer: _BatchNorm, choices: Choices) -> None:
    """Register the tensors of domains; they start as the layer's own, or as those that a copied layer already has."""
    number = choices.num_domains
    copied = {key: tensor for key, tensor in remove_domain_tensors(layer).items() if len(tensor) == number}
    if choices.population_statistics == "domain":
        mean, var, _ = statistics_of(layer)
        batches = torch.zeros((), dtype=torch.long, device=mean.device)
        for key, own in zip(STATISTICS, (mean, var, batches), strict=True):
            initial = own.expand(number, *own.shape).clone()
            layer.register_buffer(key, copied.get(key, initial), persistent=False)
    if choices.affine == "domain":
        for key, name in zip(AFFINE, ("weight", "bias"), strict=True):
            parameter = layer._parameters.get(name)
            if parameter is not None:
                initial = parameter.detach().expand(number, -1).clone()
                new = nn.Parameter(initial, requires_grad=parameter.requires_grad)
                layer.register_parameter(key, cast(nn.Parameter, copied.get(key, new)))
                parameter.requires_grad_(False)  # not used; DDP expects a gradient of all others


def remove_domain_tensors(layer: _BatchNorm) -> dict[str, Tensor]:
    """Remove and return the tensors of domains; the layer's own affine trains again if that of domains did."""
    removed: dict[str, Tensor] = {}
    for tensors in (layer._buffers, layer._parameters):
        removed |= {key: t for key in (*STATISTICS, *AFFINE) if (t := tensors.pop(key, None)) is not None}
    layer._non_persistent_buffers_set.difference_update(STATISTICS)
    for key, name in zip(AFFINE, ("weight", "bias"), strict=True):
        if key in removed:
            cast(Tensor, layer._parameters[name]).requires_grad_(removed[key].requires_grad)
    return removed


def num_domains(layer: nn.Module) -> int:
    """Number of domains whose population statistics a layer keeps; 0 if it has no domains or is a copy."""
    mean = layer._buffers.get(STATISTICS[0]) if has_behavior(layer, "domain") else None
    return 0 if mean is None else len(mean)


def statistics_of(layer: _BatchNorm, domain: int | None = None) -> tuple[Tensor, Tensor, Any]:
    """The stored mean, variance and number of batches of a domain; or the layer's own, which may count no batches."""
    buffers = cast("dict[str, Tensor]", layer._buffers)
    if domain is None:
        return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    return buffers["domain_mean"][domain], buffers["domain_var"][domain], buffers["domain_batches"][domain]


def get_state(layers: dict[str, _BatchNorm], affine: bool = False) -> State:
    """Copy the statistics of domains to the CPU, and their affine if asked for."""
    keys = (*STATISTICS, *(AFFINE if affine else ()))
    state = {}
    for name, layer in layers.items():
        tensors = {**layer._buffers, **layer._parameters}
        state[name] = {key: t.detach().cpu().clone() for key in keys if (t := tensors.get(key)) is not None}
    return {name: saved for name, saved in state.items() if saved}


@torch.no_grad()
def load_state(layers: dict[str, _BatchNorm], state: State) -> None:
    """Copy a state from `get_state` into layers; those with shared population statistics ignore saved statistics."""
    for name, layer in layers.items():
        tensors, saved = {**layer._buffers, **layer._parameters}, state.get(name, {})
        if any(tensors.get(key) is not None and key not in saved for key in STATISTICS):
            advice = "Use the layers=, population_statistics= and affine= of the fit that saved it."
            raise ValueError(f"The state has no statistics of domains for layer {name!r}. {advice}")
        for key, value in saved.items():
            tensor = tensors.get(key)
            if tensor is None and key in STATISTICS:
                continue
            if tensor is None or tensor.shape != value.shape:
                now = "none" if tensor is None else f"{len(tensor)} domains"
                advice = "Use the num_domains=, population_statistics= and affine= of the fit that saved it."
                found = f"{key} of layer {name!r} was saved for {len(value)} domains, but the layer has {now}"
                raise ValueError(f"{found}. {advice}")
            tensor.copy_(value)
