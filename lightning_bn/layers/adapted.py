"""AdaBN: the layer normalizes with the statistics of the target domain (paper, Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.moments import Moments
from lightning_bn.core.prior import with_prior
from lightning_bn.layers.behavior import Behavior, has_behavior
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm


class Adapted(Behavior):
    """A mark: the stored statistics are a target domain's, until they are put back."""

    kind = "adapted"
    name = "adapted"

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Do as ever."""
        return forward(input)


class Adapting(Behavior):
    """In eval mode, the statistics of every input so far, the current one included; nothing is written.

    As long as no more than one value per channel came, which has no variance, it is the stored statistics.

    Args:
        layers: Qualified name -> layer.
        prior_samples: How many samples the stored statistics are worth.

    Attributes:
        samples: Samples of the target domain so far, those of the current batch included; whoever runs the model says.
        nonfinite: Inputs with a NaN or infinite value, which are left out: they would spoil all that come after them.
    """

    kind = "adapted"
    name = "adapting"
    not_copied = (
        "A deep copy of a model that AdaBNCallback(online=True) is adapting is a plain model: it evaluates with the "
        "stored statistics, which are not adapted."
    )

    def __init__(self, layers: Mapping[str, _BatchNorm], prior_samples: int) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self.prior_samples = prior_samples
        self.samples = self.nonfinite = 0
        self._seen: dict[_BatchNorm, tuple[int, Moments]] = {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Add what the layer's ``batch_norm`` call is given to what was seen, and normalize it with all of that."""
        if layer.training or layer.running_mean is None or has_behavior(layer, "frozen", "batch mode"):
            return forward(input)

        def instead(call: BatchNormCall) -> Tensor:
            return call.run() if call.training else self._adapted(layer, call)

        return replace_batch_norm(instead, self._names[layer], forward, input)

    def _adapted(self, layer: _BatchNorm, call: BatchNormCall) -> Tensor:
        stored_mean, stored_var = call.running_mean, call.running_var
        if call.values:
            self._add(layer, call)
        total, seen = self._seen.get(layer, (0, None))
        if seen is None or total < 2 or stored_mean is None or stored_var is None:
            return call.run()
        mean, var = (
            with_prior(source.double(), target, self.prior_samples, self.samples).to(source.dtype)
            for source, target in ((stored_mean, seen.mean), (stored_var, seen.var))
        )
        return call._replace(running_mean=mean, running_var=var).run()

    def _add(self, layer: _BatchNorm, call: BatchNormCall) -> None:
        moments = Moments.of(call.input)
        if not torch.stack([moments.mean, moments.m2]).isfinite().all():
            self.nonfinite += 1
            return
        before, seen = self._seen.get(layer, (0, None))
        self._seen[layer] = before + call.values, moments if seen is None else seen + moments
