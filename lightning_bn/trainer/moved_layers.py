"""Which layers training reaches, as told by what has moved in them since the fit began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

TOLD_BY_STATISTICS = ("num_batches_tracked", "running_mean")
_TOLD_BY = (*TOLD_BY_STATISTICS, "weight", "bias")


class Movement:
    """What has moved in layers since this was made; keeps copies, and no hold on the layers.

    Args:
        layers: Qualified name -> layer.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._then = {name: {key: t.detach().clone() for key, t in _parts(m).items()} for name, m in layers.items()}

    def of(self, layers: Mapping[str, _BatchNorm], told_by: Sequence[str] = _TOLD_BY) -> list[str]:
        """Which of these layers have moved.

        Args:
            layers: Qualified name -> layer.
            told_by: The parts that count. Weight and bias tell of layers that training moves by other ways than its own
                forwards: a teacher that is an average.
        """
        return [name for name, layer in layers.items() if self._moved(name, _parts(layer), told_by)]

    def _moved(self, name: str, now: Mapping[str, Tensor], told_by: Sequence[str]) -> bool:
        then = self._then.get(name, {})
        known = [key for key in told_by if key in then and key in now]
        return not all(torch.equal(then[key], now[key].to(then[key].device)) for key in known)


def as_made(layers: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Those whose statistics are what they were made with: mean 0 and variance 1."""
    return {
        name: layer
        for name, layer in layers.items()
        if not layer.running_mean.any() and (layer.running_var == 1).all()  # type: ignore[union-attr]
    }


def _parts(layer: _BatchNorm) -> dict[str, Tensor]:
    own = {**layer._buffers, **layer._parameters}
    return {key: t for key in _TOLD_BY if (t := own.get(key)) is not None}
