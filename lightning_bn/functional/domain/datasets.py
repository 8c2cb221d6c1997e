"""Datasets as domains: whoever runs the model says which one its samples are from.

Samples of several in one batch are told apart: the layer then runs once for each domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.domain.specific import Choice, DomainSpecific, Shown, uses_batch_stats
from lightning_bn.layers.behavior import Behavior, has_behavior

Domain: TypeAlias = "int | Tensor"
"""The domain of a batch; or of each of its samples, ``(N,)``."""

_SHOWN: ContextVar[tuple[tuple[Datasets, Domain], ...]] = ContextVar("datasets")
"""Innermost last. Of a context, so that forwards that wait for each other keep their own."""


class Datasets:
    """Which dataset a model is shown.

    Args:
        number: How many there are.

    Attributes:
        current: The domain of what is shown, unless `use_domain` sets another.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.current: Domain | None = None

    @contextmanager
    def use_domain(self, domain: Domain) -> Iterator[None]:
        """Say which one it is, for a while."""
        before = _SHOWN.get(())
        token = _SHOWN.set((*before, (self, self.checked(domain))))
        try:
            yield
        finally:
            _SHOWN.reset(token)

    def checked(self, domain: Any) -> Domain:
        """A domain, or those of samples, if there are such.

        Raises:
            TypeError: If it is no whole number, nor a tensor of some.
            ValueError: If it is out of range.
        """
        if isinstance(domain, Tensor) and domain.ndim == 0 and not domain.is_floating_point():
            domain = int(domain)
        samples = isinstance(domain, Tensor) and domain.ndim == 1 and domain.dtype in (torch.int32, torch.int64)
        if not samples and (not isinstance(domain, Integral) or isinstance(domain, bool)):
            raise TypeError(
                f"A domain is a whole number, or a tensor of one for each sample of the batch, but is {domain!r}."
            )
        found = set(domain.tolist()) if isinstance(domain, Tensor) else {domain}
        unknown = sorted(d for d in found if not 0 <= d < self.number)
        if unknown:
            raise ValueError(f"Domain {unknown[0]} is none of the {self.number} there are: 0 to {self.number - 1}.")
        return domain.long() if isinstance(domain, Tensor) else int(domain)

    def said(self) -> Domain | None:
        """What is shown; None if nobody has said."""
        shown = [domain for datasets, domain in _SHOWN.get(()) if datasets is self]
        return shown[-1] if shown else self.current

    def now(self) -> Domain:
        """What is shown.

        Raises:
            RuntimeError: If nobody has said.
        """
        domain = self.said()
        if domain is None:
            raise RuntimeError(
                "Nobody has said which domain the model is shown: run it within handle.use_domain(domain), or give the "
                "layers names of modules by level_modules=, if the domains are feature levels."
            )
        return domain

    def shown(self, layer: _BatchNorm) -> Shown:
        """What a layer is shown."""
        part = _PART.get(None)
        return part if part is not None else Shown(self.now())


_PART: ContextVar[Shown | None] = ContextVar("part")


class SplitByDomain(Behavior):
    """Samples of several domains in one batch: run the layer for each of them by itself, or note whose they are.

    Args:
        names: Layer -> qualified name.
        datasets: What says whose they are.
        specific: What the layer does with them.
        train_statistics: Whether each domain is normalized by itself.
    """

    name = ""
    outermost = True

    def __init__(
        self, names: dict[_BatchNorm, str], datasets: Datasets, specific: DomainSpecific, train_statistics: Choice
    ) -> None:
        self._names, self._datasets, self._specific, self._train_statistics = (
            names,
            datasets,
            specific,
            train_statistics,
        )

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Run the layer's forward on the parts of ``input`` that are normalized by themselves."""
        output: Tensor = self._in_parts(layer, forward, input)
        return output

    def normalization_batch(self, samples: float) -> float:
        """Those of the largest domain, if samples of several are shown and each domain is normalized by itself."""
        domain = self._datasets.said()
        if self._train_statistics == "shared" or not isinstance(domain, Tensor) or not len(domain):
            return samples
        return int(domain.bincount().max())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _in_parts(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        if not uses_batch_stats(layer) and self._specific.population == self._specific.affine == "shared":
            return forward(input)
        domain = self._datasets.now()
        in_a_pass = has_behavior(layer, "batch mode") and uses_batch_stats(layer)
        if isinstance(domain, int):
            return self._of_one(layer, forward, input, domain, in_a_pass)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"Layer {self._names[layer]!r} is given a {type(input).__name__}, whose samples cannot be told apart: "
                "leave it out by layers=, or give one domain for the batch."
            )
        if len(domain) != len(input):
            raise ValueError(
                f"Layer {self._names[layer]!r} is given {len(input)} rows, and there are domains of {len(domain)} "
                "samples: leave it out by layers=, or give one domain for the batch."
            )
        domain = domain.cpu()
        rows = {d: (domain == d).nonzero().flatten().to(input.device) for d in range(self._datasets.number)}
        if self._train_statistics == "shared" and uses_batch_stats(layer):
            return self._shown(layer, forward, input, Shown(domain))
        if not in_a_pass:  # where micro-batches wait for each other, all come by all domains
            rows = {d: r for d, r in rows.items() if len(r)}
            self._check_one_value(layer, input, rows)
        shown = Shown(0, parts=len(rows))
        outputs = []
        for d, r in rows.items():
            shown.domain = d
            outputs.append(self._shown(layer, forward, input[r], shown))
        if not outputs:
            return forward(input)
        order = torch.cat(list(rows.values()))
        return torch.cat(outputs)[order.argsort()]

    def _of_one(
        self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any, domain: int, in_a_pass: bool
    ) -> Any:
        if not uses_batch_stats(layer):
            return forward(input)
        if self._train_statistics == "shared":
            return self._shown(layer, forward, input, Shown(torch.tensor([domain])))
        output = None
        for d in range(self._datasets.number) if in_a_pass else (domain,):
            if d == domain:
                output = self._shown(layer, forward, input, Shown(d))
            else:
                self._specific.bring_nothing(layer, d)
        return output

    def _check_one_value(self, layer: _BatchNorm, input: Tensor, rows: dict[int, Tensor]) -> None:
        """Before any domain is normalized, and its statistics moved."""
        alone = [d for d, r in rows.items() if len(r) * input[0].numel() == layer.num_features]
        if alone and uses_batch_stats(layer):
            raise ValueError(
                f"Layer {self._names[layer]!r} is given one value per channel of domain {alone[0]}, which cannot be "
                "normalized by itself: have batches hold two samples or more of each of their domains, or pass "
                "train_statistics='shared'."
            )

    @staticmethod
    def _shown(layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor, shown: Shown) -> Tensor:
        token = _PART.set(shown)
        try:
            return forward(input)
        finally:
            _PART.reset(token)
