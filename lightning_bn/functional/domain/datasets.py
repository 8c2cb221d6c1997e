"""Datasets as domains: the caller sets the domain of a batch, or of each of its samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.compiler import disable_compile
from lightning_bn.core.ranks import get_rank
from lightning_bn.functional.domain.specific import DomainAssignment, DomainSource, record_empty, uses_batch_stats
from lightning_bn.functional.domain.tensors import Choices
from lightning_bn.layers.behavior import Behavior, has_behavior
from lightning_bn.layers.frozen import Frozen

Domain: TypeAlias = "int | Tensor"
"""The domain of a batch; or of each of its samples, ``(N,)``."""


class Datasets(Behavior, DomainSource):
    """Runs the layer's other behaviors on each domain's part of a batch; training with shared statistics does not.

    Attributes:
        default: What the domains of the model's input are outside of `use`.
    """

    name = ""
    outermost = True

    def __init__(self, layers: dict[_BatchNorm, str], choices: Choices) -> None:
        super().__init__(layers, choices)
        self.default: DomainAssignment | None = None
        self._has_warned = False

    def behaviors(self) -> Sequence[tuple[nn.Module, Behavior]]:
        return [(layer, self) for layer in self.layers]

    def current(self) -> DomainAssignment | None:
        return super().current() or self.default

    def unknown(self, layer: nn.Module) -> RuntimeError:
        advice = "Call the model inside `with handle.use_domain(domain):`, or pass level_modules= for feature levels."
        return RuntimeError(f"No domain is set. {advice}")

    def of(self, domain: Any) -> DomainAssignment:
        """The assignment of a batch to the domain that a caller has passed, of any type and value."""
        number = self.choices.num_domains
        if isinstance(domain, Tensor) and domain.ndim == 0 and not domain.is_floating_point():
            domain = int(domain)
        per_sample = isinstance(domain, Tensor) and domain.ndim == 1 and domain.dtype in (torch.int32, torch.int64)
        if not per_sample and (not isinstance(domain, Integral) or isinstance(domain, bool)):
            raise TypeError(f"A domain must be an int, or a tensor with one int per sample, but is {domain!r}.")
        for d in sorted(set(domain.tolist() if isinstance(domain, Tensor) else [domain])):
            if not 0 <= d < number:
                raise ValueError(f"Domain {d} does not exist: num_domains={number}, so 0 to {number - 1}.")
        return DomainAssignment(domain.long() if isinstance(domain, Tensor) else int(domain))

    def normalization_batch(self, samples: float) -> float:
        current = self.current()
        domain = None if current is None else current.domain
        if self.choices.train_statistics == "shared" or not isinstance(domain, Tensor) or not len(domain):
            return samples
        return int(domain.bincount().max())

    @disable_compile
    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        uses_batch, choices = uses_batch_stats(layer), self.choices
        if not uses_batch and choices.population_statistics == choices.affine == "shared":
            return forward(input)
        domain = self.assignment(layer).domain
        if isinstance(domain, Tensor):
            self._check_samples(layer, input, domain)
            domain = domain.cpu()
        if uses_batch and choices.train_statistics == "shared":
            together = DomainAssignment(domain if isinstance(domain, Tensor) else torch.tensor([domain]))
            with self.use(together):
                return forward(input)

        in_pass = uses_batch and has_behavior(layer, "batch mode")
        present, rows, single_valued = [0], [], list[int]()
        if isinstance(domain, int):
            present = [domain]
        elif len(domain):
            if uses_batch and not in_pass:
                single_valued = self._with_one_value(layer, input, domain)
            present = domain.unique().tolist()
            if len(present) > 1:
                rows = [torch.eq(domain, d).nonzero().flatten().to(input.device) for d in present]
        assignment = DomainAssignment(0, parts=len(present) - len(single_valued))
        outputs: list[Tensor] = []
        for d in range(choices.num_domains):
            if d in present:
                assignment.domain = d
                part = input[rows[len(outputs)]] if rows else input
                with self.use(assignment):
                    outputs.append(Frozen().forward(layer, forward, part) if d in single_valued else forward(part))
            elif in_pass:
                record_empty(layer, d if choices.population_statistics == "domain" else None)
        return torch.cat(outputs)[torch.cat(rows).argsort()] if rows else outputs[0]

    def _check_samples(self, layer: _BatchNorm, input: Any, domain: Tensor) -> None:
        name, advice = self.layers[layer], "Leave it out by layers=, or pass one domain for the batch."
        if not isinstance(input, Tensor):
            raise TypeError(f"Layer {name!r} gets a {type(input).__name__}, which cannot be split by domain. {advice}")
        if len(domain) != len(input):
            rows = f"{len(input)} rows, but the domains are those of {len(domain)} samples"
            raise ValueError(f"Layer {name!r} gets {rows}. {advice}")

    def _with_one_value(self, layer: _BatchNorm, input: Tensor, domain: Tensor) -> list[int]:
        """The domains with one value per channel, which has no variance."""
        counts = enumerate(domain.bincount().tolist())
        single_valued = [d for d, count in counts if count * input[0].numel() == layer.num_features]
        if single_valued and not self._has_warned and get_rank() == 0:
            warnings.warn(
                f"Layer {self.layers[layer]!r} gets one value per channel of domain {single_valued[0]}, which has no "
                "variance, and normalizes it with the stored statistics. Give each domain of a batch two samples or "
                "more, pass train_statistics='shared', or leave the layer out by layers=.",
                stacklevel=2,
            )
            self._has_warned = True
        return single_valued
