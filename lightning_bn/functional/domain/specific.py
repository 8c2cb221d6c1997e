"""The behavior of a layer with domains: it uses the statistics, or the affine, of its input's domain (Sec. 5.2).

`Datasets` and `Levels` say of which domain an input is. The layer's own running statistics are updated as if there were
one domain: an EMA over the batches of all domains.
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import Moments, batch_statistics
from lightning_bn.functional.domain.tensors import AFFINE, OWN_STATISTICS, Choices, statistics_of
from lightning_bn.layers.batch_mode import BatchMode, forward_with_buffers
from lightning_bn.layers.behavior import Behavior, behaviors_of, has_behavior
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm


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


class DomainSpecific(Behavior):
    """Keeps population statistics, or an affine, per domain; `Levels` and `Datasets` group the inputs."""

    kind = "domain"

    def __init__(self, source: DomainSource) -> None:
        self.name = f"{source.choices.num_domains} domains"
        self._source, self._names = source, source.layers
        self._stores = source.choices.population_statistics == "domain"
        self._has_affine = source.choices.affine == "domain"
        if self._stores or self._has_affine:
            self.not_copied = (
                "A deep copy of a model under domain_bn is a plain model, which evaluates all domains alike. Call "
                "domain_bn on the copy with the same choices: it uses the copied statistics and affine of each domain."
            )

    def domain(self, layer: _BatchNorm) -> int | None:
        domain = self._source.assignment(layer).domain if self._stores else None
        return domain if isinstance(domain, int) else None

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        assignment, uses_batch = self._source.assignment(layer), uses_batch_stats(layer)
        domain, tracks = assignment.domain, layer.track_running_stats or not layer.training
        if isinstance(domain, Tensor):
            records = self._stores and uses_batch and tracks
            if records or self._has_affine:
                forward = functools.partial(self._forward_mixed, layer, forward, assignment, records)
        elif self._has_affine:
            forward = functools.partial(_forward_with_affine, layer, forward, domain)

        if uses_batch and tracks and not has_behavior(layer, "batch mode"):
            return self._train(layer, forward, input, assignment)
        if uses_batch or not tracks or not self._stores:
            return forward(input)
        mean, var, _ = statistics_of(layer, cast(int, domain))  # `Datasets` splits the batches of eval mode
        return forward_with_buffers(layer, forward, input, False, mean, var)

    def _train(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any, assignment: DomainAssignment) -> Any:
        if isinstance(assignment.domain, Tensor):  # normalized together: plain BatchNorm
            return _on_copies(layer, forward, input) if is_recomputing() else forward(input)
        found: list[Moments] = []

        def batch_norm(call: BatchNormCall) -> Tensor:
            if not call.training or not call.values:
                return call.run()
            self._check_channels(layer, call)
            output, moments = _run_and_measure(call, statistics_of(layer)[0])
            found.append(moments)
            return output

        output = _on_copies(layer, lambda x: replace_batch_norm(batch_norm, self._names[layer], forward, x), input)
        if not found or is_recomputing():
            return output
        moments = functools.reduce(operator.add, found)
        if self._stores:
            _update_ema(layer, assignment.domain, moments)
        assignment.moments.append(moments)
        if len(assignment.moments) == assignment.parts:  # the last domain of the batch
            _update_ema(layer, None, functools.reduce(operator.add, assignment.moments))
            assignment.moments.clear()
        return output

    def _forward_mixed(
        self, layer: _BatchNorm, forward: Callable[[Any], Any], assignment: DomainAssignment, records: bool, input: Any
    ) -> Any:
        """Normalize several domains together; record the moments of each, and apply the affine of each."""

        def batch_norm(call: BatchNormCall) -> Tensor:
            self._check_order(layer, call, input, assignment)
            if records:
                self._check_channels(layer, call)
                for domain, part in enumerate(self._parts(call.input.detach(), assignment)):
                    _record(layer, call, domain, part)
            return _run_with_affines(layer, call, assignment) if self._has_affine else call.run()

        return replace_batch_norm(batch_norm, self._names[layer], forward, input)

    def _parts(self, input: Tensor, assignment: DomainAssignment) -> Sequence[Tensor]:
        """Each domain's part of an input."""
        dim = assignment.dim
        domains = cast(Tensor, assignment.domain).expand(input.shape[dim])
        if (domains.diff() < 0).any():
            input = input.index_select(dim, domains.argsort(stable=True).to(input.device))
        counts = domains.bincount(minlength=self._source.choices.num_domains).tolist()
        return cast("tuple[Tensor, ...]", input.split(counts, dim))

    def _check_order(self, layer: _BatchNorm, call: BatchNormCall, given: Any, assignment: DomainAssignment) -> None:
        """Raise if the layer has reordered its input before the call, so that the domains of the rows are unknown."""
        domains, x, dim = cast(Tensor, assignment.domain), call.input, assignment.dim
        same_length = x.ndim > max(dim, 1) and x.shape[dim] == len(domains)
        # a 2d input may consist of other rows, as many by chance: those that a mask has left
        complete = x.ndim > 2 or (isinstance(given, Tensor) and given.numel() == x.numel())
        if len(domains) > 1 and not (same_length and complete):
            raise TypeError(
                f"Layer {self._names[layer]!r} reshapes its input to {tuple(x.shape)}, so the domains of its "
                f"{len(domains)} samples are unknown. Leave it out by layers=, or pass one domain for the batch."
            )

    def _check_channels(self, layer: _BatchNorm, call: BatchNormCall) -> None:
        stored, channels = len(statistics_of(layer)[0]), call.input.shape[1]
        if stored != channels:
            found = f"stores statistics of {stored} channels but normalizes {channels}"
            raise TypeError(f"Layer {self._names[layer]!r} {found}. Leave it out by layers=.")


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


def record_empty(layer: _BatchNorm, domain: int | None) -> None:
    """Record that a domain has no samples in a batch: micro-batches in lockstep wait for each domain's moments."""
    batch_mode = batch_mode_of(layer)
    if batch_mode is not None:
        batch_mode.record(layer, domain, statistics_of(layer)[0].new_empty(0, layer.num_features), True)


def _record(layer: _BatchNorm, call: BatchNormCall, domain: int, part: Tensor) -> None:
    batch_mode, count = batch_mode_of(layer), part.numel() // part.shape[1]
    if batch_mode is not None:
        batch_mode.record(layer, domain, part, batch_mode.takes(layer, call))
    elif call.training and count > 1 and not is_recomputing():  # a single value has no variance
        _update_ema(layer, domain, _moments(*batch_statistics(part), count))


def _run_and_measure(call: BatchNormCall, running_mean: Tensor) -> tuple[Tensor, Moments]:
    if running_mean.element_size() == 2 and call.values > 1:  # 16-bit buffers would round the batch statistics
        return call.normalize_by_itself(), _moments(*batch_statistics(call.input.detach()), call.values)
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_mean)
    output = call._replace(running_mean=mean, running_var=var, momentum=1.0).run()  # the kernel writes an unbiased var
    return output, _moments(mean, var * ((call.values - 1) / call.values), call.values)


def _moments(mean: Tensor, var: Tensor, count: int) -> Moments:
    """Moments in the precision of ``mean``, not in float64, which not all devices have."""
    return Moments(torch.tensor(float(count), dtype=torch.float64), mean, var * count)


@torch.no_grad()
def _update_ema(layer: _BatchNorm, domain: int | None, moments: Moments) -> None:
    """Update statistics by a batch as torch does, with its unbiased variance: a domain's, or the layer's own."""
    mean, var, batches = statistics_of(layer, domain)
    if batches is not None:
        batches += 1
    for stored, new in ((mean, moments.mean), (var, moments.m2 / (moments.count - 1))):
        if layer.momentum is not None:
            stored.copy_(stored.to(new.dtype).lerp(new, layer.momentum))
        elif batches is not None:  # the plain average
            stored.copy_(stored.to(new.dtype).lerp(new, 1 / batches.to(new.dtype)))


def _run_with_affines(layer: _BatchNorm, call: BatchNormCall, assignment: DomainAssignment) -> Tensor:
    """Run a call, with each domain's affine on its part of the input."""
    dim = assignment.dim
    output = call._replace(weight=None, bias=None).run()
    domains = cast(Tensor, assignment.domain).to(output.device)
    shape = [1] * output.ndim
    shape[dim], shape[1] = len(domains), output.shape[1]
    weight, bias = _affine_of(layer, domains)
    for parameter, operation in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            aligned = (parameter if dim == 0 else parameter.T).reshape(shape)
            output = operation(output, aligned.to(output.dtype))
    return output


def _forward_with_affine(layer: _BatchNorm, forward: Callable[[Any], Any], domain: int, input: Any) -> Any:
    """Run the layer's forward with a domain's rows in place of its weight and bias."""
    weight, bias = _affine_of(layer, domain)
    with _replaced(layer._parameters, {"weight": weight, "bias": bias}):
        return forward(input)


def _affine_of(layer: _BatchNorm, domain: int | Tensor) -> list[Tensor | None]:
    parameters = (layer._parameters.get(key) for key in AFFINE)
    return [p if p is None else p[domain] for p in parameters]


def _on_copies(layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
    """Run the layer's forward on copies of its buffers, because it may update them."""
    own = {key: layer._buffers[key] for key in OWN_STATISTICS}
    with _replaced(layer._buffers, {key: value if value is None else value.clone() for key, value in own.items()}):
        return forward(input)


@contextmanager
def _replaced(tensors: dict[str, Any], replacements: Mapping[str, Tensor | None]) -> Iterator[None]:
    own = {key: tensors[key] for key in replacements}
    tensors.update(replacements)
    try:
        yield
    finally:
        tensors.update(own)
