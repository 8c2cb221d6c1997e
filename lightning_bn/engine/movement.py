"""Which layers training reaches, as told by what has moved in them since the fit began."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

_TOLD_BY = ("num_batches_tracked", "running_mean", "weight", "bias")


class Movement:
    """What has moved in layers since this was made; keeps copies, and no hold on the layers.

    Weight and bias tell of layers that something else than a forward of training keeps: a teacher that is an average.

    Args:
        layers: Qualified name -> layer.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._then = {name: [t.detach().clone() for t in _parts(layer)] for name, layer in layers.items()}

    def of(self, layers: Mapping[str, _BatchNorm]) -> list[str]:
        """Which of these layers have moved."""
        return [name for name, layer in layers.items() if name in self._then and self._moved(name, layer)]

    def _moved(self, name: str, layer: _BatchNorm) -> bool:
        now = _parts(layer)
        return not all(torch.equal(a, b.to(a.device)) for a, b in zip(self._then[name], now, strict=True))


def as_made(layers: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Those whose statistics are what they were made with: mean 0 and variance 1."""
    return {
        name: layer
        for name, layer in layers.items()
        if not layer.running_mean.any() and (layer.running_var == 1).all()  # type: ignore[union-attr]
    }


def _parts(layer: _BatchNorm) -> list[Tensor]:
    own = {**layer._buffers, **layer._parameters}
    return [t for key in _TOLD_BY if (t := own.get(key)) is not None]
