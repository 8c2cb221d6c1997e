"""Domain-specific BN: a layer that sees several domains keeps statistics, or an affine, for each (paper, Sec. 5.2).

The statistics of domains are buffers ``(domains, C)`` of the layer that no state dict holds. The layer's own running
statistics go on as if there were one domain: an EMA of the batches of all domains together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import batch_statistics
from lightning_bn.layers.batch_mode import BatchMode, forward_with_buffers
from lightning_bn.layers.behavior import Behavior, behaviors_of, has_behavior
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm

Choice: TypeAlias = Literal["shared", "domain"]
"""Whether all domains have something in common, or each has its own."""

STATISTICS = ("domain_mean", "domain_var", "domain_batches")
"""Buffers of a layer with population statistics of each domain; the last counts batches, as num_batches_tracked."""
AFFINE = ("domain_weight", "domain_bias")
"""Parameters of a layer with an affine of each domain, in the place of:"""
OWN_AFFINE = ("weight", "bias")


class Statistics(NamedTuple):
    """Of a part of a batch: mean, unbiased variance, values per channel."""

    mean: Tensor
    var: Tensor
    values: int


@dataclass
class Shown:
    """What a layer is shown at the moment.

    Attributes:
        domain: The domain; or, for each index of the input along ``dim``, its domain.
        dim: 0 for samples, 2 for levels that lie side by side.
        parts: Into how many inputs, one for each domain, the batch is divided.
        seen: Statistics of those that have come so far.
    """

    domain: int | Tensor
    dim: int = 0
    parts: int = 1
    seen: list[Statistics] = field(default_factory=list)


class Where(Protocol):
    """Knows what a layer is shown."""

    def shown(self, layer: _BatchNorm) -> Shown:
        """What a layer is shown at the moment."""


class DomainSpecific(Behavior):
    """Population statistics, or an affine, of each domain. Which inputs are normalized together, others see to.

    Args:
        names: Layer -> qualified name, to name one that cannot do it.
        domains: How many there are.
        population_statistics: Whether each has population statistics.
        affine: Whether each has a weight and a bias.
        where: What says which one a layer is shown.
    """

    kind = "domain"

    def __init__(
        self, names: Mapping[_BatchNorm, str], domains: int, population: Choice, affine: Choice, where: Where
    ) -> None:
        self.name = f"{domains} domains"
        if "domain" in (population, affine):
            self.not_copied = (
                "A deep copy of a model under domain_bn is a plain model, which evaluates all domains alike: call "
                "domain_bn on the copy as well, with the same choices. It takes over what each domain has."
            )
        self.population, self.affine = population, affine
        self._names, self._where = names, where

    def domain(self, layer: _BatchNorm) -> int | None:
        """The one it is shown, if each has population statistics; None for several together."""
        domain = self._where.shown(layer).domain if self.population == "domain" else None
        return domain if isinstance(domain, int) else None

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Run the layer's own forward with the statistics and the affine of a domain."""
        shown = self._where.shown(layer)
        if self.affine == "domain":
            forward = self._with_affine(layer, forward, shown)
        if layer.training and not layer.track_running_stats:
            return forward(input)
        if uses_batch_stats(layer):
            if isinstance(shown.domain, Tensor) and self.population == "domain":
                forward = self._seeing(layer, forward, shown)
            return forward(input) if has_behavior(layer, "batch mode") else self._training(layer, forward, input, shown)
        if self.population == "shared":
            return forward(input)
        mean, var = (layer._buffers[key] for key in STATISTICS[:2])
        assert mean is not None and var is not None and isinstance(shown.domain, int)  # several are told apart before
        return forward_with_buffers(layer, forward, input, False, mean[shown.domain], var[shown.domain])

    def _seeing(self, layer: _BatchNorm, forward: Callable[[Any], Any], shown: Shown) -> Callable[[Any], Any]:
        """The layer's own forward, with a look at each domain's part of what is normalized as a whole."""

        def at(given: Any) -> Any:
            def batch_norm(call: BatchNormCall) -> Tensor:
                for domain, part in self._parts(layer, call, given, shown):
                    self._see(layer, call, domain, part)
                return call.run()

            return replace_batch_norm(batch_norm, self._names[layer], forward, given)

        return at

    def _parts(self, layer: _BatchNorm, call: BatchNormCall, given: Any, shown: Shown) -> Iterator[tuple[int, Tensor]]:
        """Each domain with its part of what a call is given."""
        self._check_other_channels(layer, call)
        self._check_mixed_up(layer, call, given, shown)
        ids, input = cast(Tensor, shown.domain), call.input.detach()
        number = len(cast(Tensor, layer._buffers[STATISTICS[0]]))
        if len(ids) == 1:
            parts = [input if domain == int(ids) else input[:0] for domain in range(number)]
        elif (ids.diff() >= 0).all():
            parts = list(input.split(ids.bincount(minlength=number).tolist(), shown.dim))
        else:
            rows = [(ids == domain).nonzero().flatten().to(input.device) for domain in range(number)]
            parts = [input.index_select(shown.dim, r) for r in rows]
        yield from enumerate(parts)

    def _check_mixed_up(self, layer: _BatchNorm, call: BatchNormCall, given: Any, shown: Shown) -> None:
        """Where the layer has made something else of an input of several domains, before it comes to its call."""
        ids, input = cast(Tensor, shown.domain), call.input
        alike = input.ndim > max(shown.dim, 1) and input.shape[shown.dim] == len(ids)
        # of two dimensions, they may be other rows: those that a mask has left
        whole = input.ndim > 2 or (isinstance(given, Tensor) and given.numel() == input.numel())
        if len(ids) > 1 and not (alike and whole):
            raise TypeError(
                f"Layer {self._names[layer]!r} makes a tensor of shape {tuple(input.shape)} of its input before it "
                f"normalizes it, of which nothing says where the {len(ids)} parts of several domains are. Leave it out "
                "by layers=, or give one domain for the batch."
            )

    def bring_nothing(self, layer: _BatchNorm, domain: int) -> None:
        """Where micro-batches wait for each other, all come by all domains."""
        modes = [b for b in behaviors_of(layer) if isinstance(b, BatchMode)]
        nothing = cast(Tensor, layer._buffers["running_mean"]).new_empty(0, layer.num_features)
        for mode in modes[:1]:
            mode.record(layer, domain if self.population == "domain" else None, nothing, True)

    def _see(self, layer: _BatchNorm, call: BatchNormCall, domain: int, part: Tensor) -> None:
        """Take the statistics of one domain's part."""
        modes = [b for b in behaviors_of(layer) if isinstance(b, BatchMode)]
        values = part.numel() // part.shape[1]
        if modes:
            modes[0].record(layer, domain, part, modes[0].takes(layer, call))
        elif call.training and values > 1 and not recomputing():
            self._move(layer, domain, _statistics(part, values))

    def _training(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any, shown: Shown) -> Any:
        if not isinstance(shown.domain, int):  # all together: plain BatchNorm, whose parts are seen at the call
            return _on_copies(layer, forward, input) if recomputing() else forward(input)
        seen: list[Statistics] = []

        def batch_norm(call: BatchNormCall) -> Tensor:
            if not call.training:
                return call.run()
            self._check_other_channels(layer, call)
            output, own = _normalized(call, cast(Tensor, layer._buffers["running_mean"]))
            seen.append(own)
            return output

        def watched(input: Any) -> Any:
            return replace_batch_norm(batch_norm, self._names[layer], forward, input)

        output = _on_copies(layer, watched, input)
        if seen and not recomputing():
            self._store(layer, shown, seen)
        return output

    @torch.no_grad()
    def _store(self, layer: _BatchNorm, shown: Shown, seen: list[Statistics]) -> None:
        """Move a domain's statistics, and with the last domain of a batch the layer's own."""
        own = seen[0] if len(seen) == 1 else Statistics(*together(seen), sum(s.values for s in seen))
        if self.population == "domain":
            self._move(layer, cast(int, shown.domain), own)
        shown.seen.append(own)
        if len(shown.seen) == shown.parts:
            counted = layer.num_batches_tracked
            if counted is not None:
                counted += 1
            running = [cast(Tensor, layer._buffers[key]) for key in ("running_mean", "running_var")]
            for stored, new in zip(running, together(shown.seen), strict=True):
                _move(stored, new, layer.momentum, counted)
            shown.seen.clear()

    def _check_other_channels(self, layer: _BatchNorm, call: BatchNormCall) -> None:
        stored, given = len(cast(Tensor, layer._buffers["running_mean"])), call.input.shape[1]
        if stored != given:
            raise TypeError(
                f"Layer {self._names[layer]!r} stores statistics of {stored} channels, and its forward normalizes "
                f"{given}: which of them belong together cannot be told. Leave it out by layers=."
            )

    @torch.no_grad()
    def _move(self, layer: _BatchNorm, domain: int, own: Statistics) -> None:
        """Move a domain's statistics towards those of a batch of it."""
        mean, var, batches = (cast(Tensor, layer._buffers[key])[domain] for key in STATISTICS)
        batches += 1
        for stored, new in ((mean, own.mean), (var, own.var)):
            _move(stored, new, layer.momentum, batches)

    def _with_affine(
        self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], shown: Shown
    ) -> Callable[[Tensor], Tensor]:
        """The layer's own forward with the affine of a domain in the place of its own."""
        weights, biases = (layer._parameters.get(key) for key in AFFINE)
        if isinstance(shown.domain, int):
            own = [p if p is None else p[shown.domain] for p in (weights, biases)]
            return lambda input: forward_with_affine(layer, forward, input, *own)

        ids, dim = shown.domain, shown.dim

        def with_affine(given: Any) -> Any:
            def batch_norm(call: BatchNormCall) -> Tensor:
                self._check_mixed_up(layer, call, given, shown)
                output = call._replace(weight=None, bias=None).run()
                of_each = ids.to(output.device)
                if weights is not None:
                    output = output * _along(weights[of_each], dim, output).to(output.dtype)
                return output if biases is None else output + _along(biases[of_each], dim, output).to(output.dtype)

            return replace_batch_norm(batch_norm, self._names[layer], forward, given)

        return with_affine


def uses_batch_stats(layer: _BatchNorm) -> bool:
    """Whether a layer normalizes with batch statistics at the moment."""
    for behavior in behaviors_of(layer):
        if isinstance(behavior, BatchMode):
            return behavior.is_by_batch(layer)
    return layer.training and not has_behavior(layer, "frozen")


def recomputing() -> bool:
    """Whether a forward is run within a backward, by activation checkpointing: what it sees was seen before."""
    return bool(torch._C._current_graph_task_id() != -1)


def give_domains(layer: _BatchNorm, domains: int, population: Choice, affine: Choice) -> Callable[[], None]:
    """Give a layer buffers and parameters of each domain, which start as its own; returns how to take them away.

    A copy of a layer with domains is plain, but for having them: then they stay what they are. The layer's own weight
    and bias have nothing to do meanwhile, and so require no gradient.
    """
    brought = {key: tensor for key, tensor in _without_domains(layer).items() if len(tensor) == domains}
    if population == "domain":
        mean, var = (cast(Tensor, layer._buffers[own]) for own in ("running_mean", "running_var"))
        batches = torch.zeros((), dtype=torch.long, device=mean.device)  # a layer may count none itself
        for key, stored in zip(STATISTICS, (mean, var, batches), strict=True):
            of_each = brought.get(key, stored.expand(domains, *stored.shape).clone())
            layer.register_buffer(key, of_each, persistent=False)
    if affine == "domain":
        for key, name in zip(AFFINE, OWN_AFFINE, strict=True):
            parameter = layer._parameters.get(name)
            if parameter is not None:
                copies = parameter.detach().expand(domains, -1).clone()
                new = nn.Parameter(copies, requires_grad=parameter.requires_grad)
                layer.register_parameter(key, cast(nn.Parameter, brought.get(key, new)))
                parameter.requires_grad_(False)

    def take_away() -> None:
        _without_domains(layer)

    return take_away


def _without_domains(layer: _BatchNorm) -> dict[str, Tensor]:
    """Take away what a layer has of domains; its own weight and bias then train if those of domains did."""
    taken: dict[str, Tensor] = {}
    for own in (layer._buffers, layer._parameters):
        found = {key: tensor for key in (*STATISTICS, *AFFINE) if (tensor := own.pop(key, None)) is not None}
        taken.update(found)
    layer._non_persistent_buffers_set.difference_update(STATISTICS)
    for key, name in zip(AFFINE, OWN_AFFINE, strict=True):
        if key in taken:
            cast(Tensor, layer._parameters[name]).requires_grad_(taken[key].requires_grad)
    return taken


def num_domains(layer: nn.Module) -> int:
    """Domains for which a layer keeps population statistics; 0 for one that keeps none, or is a plain copy."""
    mean = layer._buffers.get(STATISTICS[0]) if has_behavior(layer, "domain") else None
    return 0 if mean is None else len(mean)


def together(parts: list[Statistics]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all parts as one."""
    means, variances = torch.stack([p.mean for p in parts]), torch.stack([p.var for p in parts])
    values = means.new_tensor([[p.values] for p in parts])
    total = values.sum()
    mean = (values * means).sum(0) / total
    squares = (values - 1) * variances + values * (means - mean).square()
    return mean, squares.sum(0) / (total - 1)


def _on_copies(layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
    """The layer's own forward, which may write statistics and count a batch, to copies."""
    buffers = layer._buffers
    own = {key: buffers[key] for key in ("running_mean", "running_var", "num_batches_tracked")}
    buffers.update({key: value if value is None else value.clone() for key, value in own.items()})
    try:
        return forward(input)
    finally:
        buffers.update(own)


def _normalized(call: BatchNormCall, running: Tensor) -> tuple[Tensor, Statistics]:
    """What a call would return, and the statistics of its input."""
    if running.element_size() == 2 and call.values > 1:  # such buffers would round the statistics of every batch
        return call.normalize_by_itself(), _statistics(call.input, call.values)
    own = Statistics(torch.zeros_like(running), torch.zeros_like(running), call.values)
    return call._replace(running_mean=own.mean, running_var=own.var, momentum=1.0).run(), own


def _statistics(input: Tensor, values: int) -> Statistics:
    mean, var = batch_statistics(input.detach())
    return Statistics(mean, var * (values / (values - 1)), values)


def _move(stored: Tensor, new: Tensor, momentum: float | None, batches: Tensor | None) -> None:
    """One step of the EMA, or of the plain average where there is no momentum."""
    if momentum is not None:
        stored.copy_(stored.to(new.dtype).lerp(new, momentum))
    elif batches is not None:
        stored.copy_(stored.to(new.dtype).lerp(new, 1 / batches.to(new.dtype)))


def _along(parameter: Tensor, dim: int, input: Tensor) -> Tensor:
    """A parameter ``(L, C)``, one row for each index of the input along ``dim``, in a shape that broadcasts."""
    shape = [1] * input.ndim
    shape[dim], shape[1] = parameter.shape
    return (parameter if dim == 0 else parameter.T).reshape(shape)


def forward_with_affine(
    layer: _BatchNorm,
    forward: Callable[[Tensor], Tensor],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The layer's own forward with another weight and bias, which are rows of parameters."""
    own = cast("dict[str, Tensor | None]", layer._parameters)
    kept = dict(own)
    own.update(weight=weight, bias=bias)
    try:
        return forward(input)
    finally:
        own.update(kept)
