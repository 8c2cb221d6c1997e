"""The behavior of a layer with domains: it uses the statistics, or the affine, of its input's domain (Sec. 5.2).

The layer's own running statistics are updated as if there were one domain: an EMA over the batches of all domains.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import Moments, batch_statistics
from lightning_bn.functional.domain.tensors import AFFINE, STATISTICS, Choice
from lightning_bn.layers.batch_mode import BatchMode, forward_with_buffers
from lightning_bn.layers.behavior import Behavior, behaviors_of, has_behavior
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm


@dataclass
class DomainAssignment:
    """The domains of a layer's current input.

    Attributes:
        domain: The domain; or the domain of each index of the input along ``dim``.
        dim: 0 for samples, 2 for concatenated levels.
        parts: Number of inputs into which the batch is split, one per domain.
        moments: Those of the parts so far.
    """

    domain: int | Tensor
    dim: int = 0
    parts: int = 1
    moments: list[Moments] = field(default_factory=list)


class DomainSource(Protocol):
    """Knows the domains of each layer's current input."""

    def assignment(self, layer: _BatchNorm) -> DomainAssignment:
        """The domains of the layer's current input."""


class DomainSpecific(Behavior):
    """Keeps population statistics, or an affine, per domain; `Levels` and `SplitByDomain` group the inputs."""

    kind = "domain"

    def __init__(
        self,
        names: Mapping[_BatchNorm, str],
        num_domains: int,
        population: Choice,
        affine: Choice,
        source: DomainSource,
    ) -> None:
        self.name = f"{num_domains} domains"
        if "domain" in (population, affine):
            self.not_copied = (
                "A deep copy of a model under domain_bn is a plain model, which evaluates all domains alike. Call "
                "domain_bn on the copy with the same choices: it uses the copied statistics and affine of each domain."
            )
        self.population, self.affine = population, affine
        self._names, self._source = names, source

    def domain(self, layer: _BatchNorm) -> int | None:
        domain = self._source.assignment(layer).domain if self.population == "domain" else None
        return domain if isinstance(domain, int) else None

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        assignment = self._source.assignment(layer)
        tracks = layer.track_running_stats or not layer.training
        uses_batch = uses_batch_stats(layer)
        if isinstance(assignment.domain, Tensor):
            records = self.population == "domain" and uses_batch and tracks
            if records or self.affine == "domain":
                forward = functools.partial(self._forward_mixed, layer, forward, assignment, records)
        elif self.affine == "domain":
            forward = functools.partial(_forward_with_affine, layer, forward, assignment.domain)
        if uses_batch and tracks and not has_behavior(layer, "batch mode"):
            return self._train(layer, forward, input, assignment)
        if uses_batch or not tracks or self.population == "shared":
            return forward(input)
        mean, var = (cast(Tensor, layer._buffers[key]) for key in STATISTICS[:2])
        domain = cast(int, assignment.domain)  # `SplitByDomain` splits the batches of eval mode
        return forward_with_buffers(layer, forward, input, False, mean[domain], var[domain])

    def record_empty(self, layer: _BatchNorm, domain: int) -> None:
        """Record that a domain has no samples in a batch: micro-batches in lockstep wait for each domain's moments."""
        batch_mode = _batch_mode(layer)
        if batch_mode is not None:
            empty = cast(Tensor, layer._buffers["running_mean"]).new_empty(0, layer.num_features)
            batch_mode.record(layer, domain if self.population == "domain" else None, empty, True)

    def _train(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any, assignment: DomainAssignment) -> Any:
        if isinstance(assignment.domain, Tensor):  # normalized together: plain BatchNorm
            return _on_copies(layer, forward, input) if is_recomputing() else forward(input)
        moments: list[Moments] = []

        def batch_norm(call: BatchNormCall) -> Tensor:
            if not call.training or not call.values:
                return call.run()
            self._check_channels(layer, call)
            output, measured = _run_and_measure(call, cast(Tensor, layer._buffers["running_mean"]))
            moments.append(measured)
            return output

        output = _on_copies(layer, lambda x: replace_batch_norm(batch_norm, self._names[layer], forward, x), input)
        if moments and not is_recomputing():
            self._update_layer_stats(layer, assignment, functools.reduce(operator.add, moments))
        return output

    @torch.no_grad()
    def _update_layer_stats(self, layer: _BatchNorm, assignment: DomainAssignment, moments: Moments) -> None:
        if self.population == "domain":
            self._update_domain_stats(layer, cast(int, assignment.domain), moments)
        assignment.moments.append(moments)
        if len(assignment.moments) == assignment.parts:  # the last domain of the batch
            batches = layer.num_batches_tracked
            if batches is not None:
                batches += 1
            mean, var = (cast(Tensor, layer._buffers[key]) for key in ("running_mean", "running_var"))
            _update_ema(mean, var, functools.reduce(operator.add, assignment.moments), layer.momentum, batches)
            assignment.moments.clear()

    @torch.no_grad()
    def _update_domain_stats(self, layer: _BatchNorm, domain: int, moments: Moments) -> None:
        mean, var, batches = (cast(Tensor, layer._buffers[key])[domain] for key in STATISTICS)
        batches += 1
        _update_ema(mean, var, moments, layer.momentum, batches)

    def _forward_mixed(
        self,
        layer: _BatchNorm,
        forward: Callable[[Any], Any],
        assignment: DomainAssignment,
        records: bool,
        input: Any,
    ) -> Any:
        """Normalize several domains together; record the moments of each, and apply the affine of each."""

        def batch_norm(call: BatchNormCall) -> Tensor:
            self._check_order(layer, call, input, assignment)
            if records:
                self._check_channels(layer, call)
                for domain, part in enumerate(self._parts(layer, call.input.detach(), assignment)):
                    self._record(layer, call, domain, part)
            return call.run() if self.affine == "shared" else _run_with_affines(layer, call, assignment)

        return replace_batch_norm(batch_norm, self._names[layer], forward, input)

    def _parts(self, layer: _BatchNorm, input: Tensor, assignment: DomainAssignment) -> Iterator[Tensor]:
        """Each domain's part of an input."""
        domains, num_domains = cast(Tensor, assignment.domain), len(cast(Tensor, layer._buffers[STATISTICS[0]]))
        if len(domains) == 1:  # of all samples
            yield from (input if domain == int(domains) else input[:0] for domain in range(num_domains))
        elif (domains.diff() >= 0).all():  # sorted: views
            yield from input.split(domains.bincount(minlength=num_domains).tolist(), assignment.dim)
        else:
            for domain in range(num_domains):
                rows = (domains == domain).nonzero().flatten().to(input.device)
                yield input.index_select(assignment.dim, rows)

    def _record(self, layer: _BatchNorm, call: BatchNormCall, domain: int, part: Tensor) -> None:
        batch_mode, count = _batch_mode(layer), part.numel() // part.shape[1]
        if batch_mode is not None:
            batch_mode.record(layer, domain, part, batch_mode.takes(layer, call))
        elif call.training and count > 1 and not is_recomputing():  # a single value has no variance
            self._update_domain_stats(layer, domain, _moments(*batch_statistics(part), count))

    def _check_order(self, layer: _BatchNorm, call: BatchNormCall, given: Any, assignment: DomainAssignment) -> None:
        """Raise if the layer has reordered its input before the call, so that the domains of the rows are unknown."""
        domains, x, dim = cast(Tensor, assignment.domain), call.input, assignment.dim
        same_length = x.ndim > max(dim, 1) and x.shape[dim] == len(domains)
        # a 2d input may consist of other rows, as many by chance: those that a mask has left
        complete = x.ndim > 2 or (isinstance(given, Tensor) and given.numel() == x.numel())
        if len(domains) > 1 and not (same_length and complete):
            raise TypeError(
                f"Layer {self._names[layer]!r} reshapes its input to {tuple(x.shape)} before it normalizes it, so the "
                f"domains of its {len(domains)} samples are unknown there. Leave it out by layers=, or pass one domain "
                "for the batch."
            )

    def _check_channels(self, layer: _BatchNorm, call: BatchNormCall) -> None:
        stored, channels = len(cast(Tensor, layer._buffers["running_mean"])), call.input.shape[1]
        if stored != channels:
            raise TypeError(
                f"Layer {self._names[layer]!r} stores statistics of {stored} channels but normalizes {channels}. Leave "
                "it out by layers=."
            )


def uses_batch_stats(layer: _BatchNorm) -> bool:
    """Return True if the layer currently normalizes with batch statistics."""
    batch_mode = _batch_mode(layer)
    if batch_mode is not None:
        return batch_mode.is_by_batch(layer)
    return layer.training and not has_behavior(layer, "frozen")


def is_recomputing() -> bool:
    """Return True inside a backward: activation checkpointing runs a forward again, whose moments were recorded."""
    return bool(torch._C._current_graph_task_id() != -1)


def _batch_mode(layer: _BatchNorm) -> BatchMode | None:
    return next((b for b in behaviors_of(layer) if isinstance(b, BatchMode)), None)


def _on_copies(layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
    """Run the layer's forward on copies of its buffers, because it may update them."""
    buffers = layer._buffers
    own = {key: buffers[key] for key in ("running_mean", "running_var", "num_batches_tracked")}
    buffers.update({key: value if value is None else value.clone() for key, value in own.items()})
    try:
        return forward(input)
    finally:
        buffers.update(own)


def _run_and_measure(call: BatchNormCall, running_mean: Tensor) -> tuple[Tensor, Moments]:
    if running_mean.element_size() == 2 and call.values > 1:  # 16-bit buffers would round the batch statistics
        return call.normalize_by_itself(), _moments(*batch_statistics(call.input.detach()), call.values)
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_mean)
    output = call._replace(running_mean=mean, running_var=var, momentum=1.0).run()  # the kernel writes an unbiased var
    return output, _moments(mean, var * ((call.values - 1) / call.values), call.values)


def _moments(mean: Tensor, var: Tensor, count: int) -> Moments:
    """Moments in the precision of ``mean``, not in float64, which not all devices have."""
    return Moments(torch.tensor(float(count), dtype=torch.float64), mean, var * count)


def _update_ema(mean: Tensor, var: Tensor, moments: Moments, momentum: float | None, batches: Tensor | None) -> None:
    """Update the EMA, or the plain average if ``momentum`` is None, by a batch; like torch, with unbiased variance."""
    if momentum is None and batches is None:
        return
    for stored, new in ((mean, moments.mean), (var, moments.m2 / (moments.count - 1))):
        weight = 1 / cast(Tensor, batches).to(new.dtype) if momentum is None else momentum
        stored.copy_(stored.to(new.dtype).lerp(new, weight))


def _run_with_affines(layer: _BatchNorm, call: BatchNormCall, assignment: DomainAssignment) -> Tensor:
    """Run a call, with each domain's affine on its part of the input."""
    dim = assignment.dim
    output = call._replace(weight=None, bias=None).run()
    domains = cast(Tensor, assignment.domain).to(output.device)
    shape = [1] * output.ndim
    shape[dim], shape[1] = len(domains), output.shape[1]
    weight, bias = (p if p is None else p[domains] for p in (layer._parameters.get(key) for key in AFFINE))
    for parameter, operation in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            aligned = (parameter if dim == 0 else parameter.T).reshape(shape)
            output = operation(output, aligned.to(output.dtype))
    return output


def _forward_with_affine(layer: _BatchNorm, forward: Callable[[Any], Any], domain: int, input: Any) -> Any:
    """Run the layer's forward with a domain's rows in place of its weight and bias."""
    parameters = cast("dict[str, Tensor | None]", layer._parameters)
    own = dict(parameters)
    weight, bias = (p if p is None else p[domain] for p in (own.get(key) for key in AFFINE))
    parameters.update(weight=weight, bias=bias)
    try:
        return forward(input)
    finally:
        parameters.update(own)
