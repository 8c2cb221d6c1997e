"""The domains of a layer's current input: set by `Datasets` or `Levels`, read by `DomainSpecific`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import Moments
from lightning_bn.functional.domain.tensors import Choices
from lightning_bn.layers.batch_mode import BatchMode
from lightning_bn.layers.behavior import Behavior, behaviors_of, has_behavior


@dataclass
class DomainAssignment:
    """The domains of a layer's current input.

    Attributes:
        domain: The domain; or the domain of each index of the input along ``dim``, a single one for all of them.
        dim: 0 for samples, 2 for concatenated levels.
        parts: Number of inputs into which the batch is split, one per domain.
        moments: Those of the parts so far.
    """

    domain: int | Tensor
    dim: int = 0
    parts: int = 1
    moments: list[Moments] = field(default_factory=list)


class DomainSource(ABC):
    """Knows the domains of the current inputs of ``layers`` (layer -> qualified name)."""

    def __init__(self, layers: dict[_BatchNorm, str], choices: Choices) -> None:
        self.layers, self.choices = layers, choices

    @abstractmethod
    def behaviors(self) -> Sequence[tuple[nn.Module, Behavior]]:
        """The behaviors that find the domains out, each with its module, innermost first."""

    @abstractmethod
    def unknown(self, layer: nn.Module) -> RuntimeError:
        """The error for an input whose domains are not known."""

    def use(self, assignment: DomainAssignment) -> AbstractContextManager[None]:
        return set_entry(_ASSIGNMENTS, self, assignment)

    def current(self) -> DomainAssignment | None:
        return _ASSIGNMENTS.get({}).get(self)

    def assignment(self, layer: _BatchNorm) -> DomainAssignment:
        current = self.current()
        if current is None:
            raise self.unknown(layer)
        return current


_ASSIGNMENTS: ContextVar[dict[DomainSource, DomainAssignment]] = ContextVar("assignment in use, of each source")


@contextmanager
def set_entry(variable: ContextVar[dict[Any, Any]], key: Any, value: Any) -> Iterator[None]:
    """Set an entry within a block and in this context alone: each of several forwards in lockstep has its own."""
    token = variable.set({**variable.get({}), key: value})
    try:
        yield
    finally:
        variable.reset(token)


def uses_batch_stats(layer: _BatchNorm) -> bool:
    """Return True if the layer currently normalizes with batch statistics."""
    batch_mode = batch_mode_of(layer)
    if batch_mode is not None:
        return batch_mode.is_by_batch(layer)
    return layer.training and not has_behavior(layer, "frozen")


def batch_mode_of(layer: _BatchNorm) -> BatchMode | None:
    """The layer's batch mode, in a pass."""
    return next((b for b in behaviors_of(layer) if isinstance(b, BatchMode)), None)


def is_recomputing() -> bool:
    """Return True inside a backward: activation checkpointing runs a forward again, whose moments were recorded."""
    return bool(torch._C._current_graph_task_id() != -1)
