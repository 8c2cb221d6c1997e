"""Datasets as domains: the caller sets the domain of a batch, or of each of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.compiler import disable_compile
from lightning_bn.functional.domain.specific import DomainAssignment, DomainSpecific, uses_batch_stats
from lightning_bn.functional.domain.tensors import Choice
from lightning_bn.layers.behavior import Behavior, has_behavior

Domain: TypeAlias = "int | Tensor"
"""The domain of a batch; or of each of its samples, ``(N,)``."""

# Context variables, because each of several forwards in lockstep has its own domain.
_USED: ContextVar[tuple[tuple[Datasets, Domain], ...]] = ContextVar("domains set by use_domain, innermost last")
_PART: ContextVar[DomainAssignment | None] = ContextVar("assignment of the part that a layer runs on", default=None)


class Datasets:
    """Knows which of ``number`` datasets the model's current input is from."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.current: Domain | None = None  # unless `use_domain` sets another

    @contextmanager
    def use_domain(self, domain: Domain) -> Iterator[None]:
        token = _USED.set((*_USED.get(()), (self, self.validate(domain))))
        try:
            yield
        finally:
            _USED.reset(token)

    def validate(self, domain: Any) -> Domain:
        """Return a domain as an int, or as an int64 tensor.

        Raises:
            TypeError: If it is neither an int nor a 1d tensor of ints.
            ValueError: If it is out of range.
        """
        if isinstance(domain, Tensor) and domain.ndim == 0 and not domain.is_floating_point():
            domain = int(domain)
        per_sample = isinstance(domain, Tensor) and domain.ndim == 1 and domain.dtype in (torch.int32, torch.int64)
        if not per_sample and (not isinstance(domain, Integral) or isinstance(domain, bool)):
            raise TypeError(f"A domain must be an int, or a tensor with one int per sample, but is {domain!r}.")
        for d in sorted(set(domain.tolist() if isinstance(domain, Tensor) else [domain])):
            if not 0 <= d < self.number:
                raise ValueError(f"Domain {d} does not exist: num_domains={self.number}, so 0 to {self.number - 1}.")
        return domain.long() if isinstance(domain, Tensor) else int(domain)

    def current_or_none(self) -> Domain | None:
        used = [domain for datasets, domain in _USED.get(()) if datasets is self]
        return used[-1] if used else self.current

    def require_current(self) -> Domain:
        domain = self.current_or_none()
        if domain is None:
            raise RuntimeError(
                "No domain is set. Call the model inside `with handle.use_domain(domain):`, or pass level_modules= if "
                "domains are feature levels."
            )
        return domain

    def assignment(self, layer: _BatchNorm) -> DomainAssignment:
        return _PART.get() or DomainAssignment(self.require_current())


class SplitByDomain(Behavior):
    """Runs the layer's other behaviors on each domain's part of a batch; training with shared statistics does not."""

    name = ""
    outermost = True

    def __init__(
        self, names: dict[_BatchNorm, str], datasets: Datasets, specific: DomainSpecific, train_statistics: Choice
    ) -> None:
        self._names, self._datasets, self._specific = names, datasets, specific
        self._train_statistics = train_statistics

    def normalization_batch(self, samples: float) -> float:
        domain = self._datasets.current_or_none()
        if self._train_statistics == "shared" or not isinstance(domain, Tensor) or not len(domain):
            return samples
        return int(domain.bincount().max())

    @disable_compile
    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        uses_batch = uses_batch_stats(layer)
        if not uses_batch and self._specific.population == self._specific.affine == "shared":
            return forward(input)
        domain = self._datasets.require_current()
        if isinstance(domain, Tensor):
            self._check_samples(layer, input, domain)
            domain = domain.cpu()
        elif not uses_batch:
            return forward(input)  # `DomainSpecific` knows the domain
        if uses_batch and self._train_statistics == "shared":
            domains = domain if isinstance(domain, Tensor) else torch.tensor([domain])
            return _run_part(forward, input, DomainAssignment(domains))
        present = [domain] if isinstance(domain, int) else domain.unique().tolist() or [0]
        in_pass = uses_batch and has_behavior(layer, "batch mode")
        if isinstance(domain, Tensor) and uses_batch and not in_pass:
            self._check_counts(layer, input, domain)
        rows = []
        if isinstance(domain, Tensor) and len(present) > 1:
            rows = [torch.eq(domain, d).nonzero().flatten().to(input.device) for d in present]
        assignment = DomainAssignment(0, parts=len(present))
        outputs: list[Tensor] = []
        for d in range(self._datasets.number):
            if d in present:
                assignment.domain = d
                outputs.append(_run_part(forward, input[rows[len(outputs)]] if rows else input, assignment))
            elif in_pass:
                self._specific.record_empty(layer, d)
        return torch.cat(outputs)[torch.cat(rows).argsort()] if rows else outputs[0]

    def _check_samples(self, layer: _BatchNorm, input: Any, domain: Tensor) -> None:
        name = self._names[layer]
        if not isinstance(input, Tensor):
            raise TypeError(
                f"Layer {name!r} gets a {type(input).__name__}, which cannot be split by domain. Leave it out by "
                "layers=, or pass one domain for the batch."
            )
        if len(domain) != len(input):
            raise ValueError(
                f"Layer {name!r} gets {len(input)} rows, but the domains are those of {len(domain)} samples. Leave it "
                "out by layers=, or pass one domain for the batch."
            )

    def _check_counts(self, layer: _BatchNorm, input: Tensor, domain: Tensor) -> None:
        """Raise before any domain's statistics are updated."""
        for d, count in enumerate(domain.bincount().tolist()):
            if count * input[0].numel() == layer.num_features:
                raise ValueError(
                    f"Layer {self._names[layer]!r} gets one value per channel of domain {d}, which has no variance. "
                    "Use batches with two or more samples of each of their domains, or train_statistics='shared'."
                )


def _run_part(forward: Callable[[Any], Any], input: Any, assignment: DomainAssignment) -> Any:
    token = _PART.set(assignment)
    try:
        return forward(input)
    finally:
        _PART.reset(token)
