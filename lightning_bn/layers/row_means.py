"""Row means: the layer does what it does, and the mean over space of each row of its inputs is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.distributed.moments import num_ranks, own_rank
from lightning_bn.layers.batch_norm_call import BatchNormCall, with_batch_norm
from lightning_bn.layers.behaviour import Behaviour, behaviours_of
from lightning_bn.layers.synced import Synced

_MOST_ROWS_OF_A_CALL = 256
"""Of a head that is given a thousand regions an image, a random part says as much."""


class RowMeans(Behaviour):
    """Keep each row's mean over space, and the number of the normalization batch it is in when the model trains.

    Of a larger input 256 rows are kept, chosen at random, the same ones in all layers that are given as many rows.

    Args:
        layers: Qualified name -> layer.

    Attributes:
        seen: Layer's name and number of its call within a batch -> means ``(n, C)`` and normalization batches ``(n,)``
            of each input. A number is the same on all ranks that share the normalization batch, and on no other.
        eps: Layer's name -> machine precision of its coarsest input.
    """

    name = "row means"

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.seen: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        self.eps: dict[str, float] = {}
        self._names = {layer: name for name, layer in layers.items()}
        self._batch = -1
        self._calls: dict[str, int] = {}

    def next_batch(self) -> None:
        """What comes from now on belongs to the next batch."""
        self._batch += 1
        self._calls = {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Keep the means of what the layer's ``batch_norm`` call is given, then do as ever."""

        def instead(call: BatchNormCall) -> Tensor:
            self._keep(layer, call.input)
            return call.run()

        return with_batch_norm(instead, self._names[layer], forward, input, required=False)

    def _keep(self, layer: _BatchNorm, input: Tensor) -> None:
        name = self._names[layer]
        call = self._calls[name] = self._calls.get(name, -1) + 1
        self.eps[name] = max(self.eps.get(name, 0.0), torch.finfo(input.dtype).eps)
        rows = input.detach().to(torch.promote_types(input.dtype, torch.float32))
        kept = _chosen(len(rows), self._batch)
        means = rows[kept].flatten(2).mean(-1) if rows.ndim > 2 else rows[kept]
        batch = (self._batch * num_ranks() + _first_rank(layer)) * 2**20 + _groups(layer, input)[kept]
        self.seen.setdefault((name, call), []).append((means, batch))


def _chosen(rows: int, seed: int) -> Tensor:
    """The rows to keep of so many."""
    if rows <= _MOST_ROWS_OF_A_CALL:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:_MOST_ROWS_OF_A_CALL]


def _groups(layer: _BatchNorm, input: Tensor) -> Tensor:
    """The number of each row's group within the input."""
    for behaviour in behaviours_of(layer):
        groups = behaviour.normalization_groups(input)
        if groups is not None:  # one at most: no layer can have two
            return groups
    return torch.zeros(len(input), dtype=torch.long)


def _first_rank(layer: _BatchNorm) -> int:
    """The first of the ranks that normalise together."""
    if num_ranks() == 1:
        return 0
    shared = [b.group for b in behaviours_of(layer) if isinstance(b, Synced)]
    if isinstance(layer, SyncBatchNorm):
        shared.append(cast("ProcessGroup | None", layer.process_group))
    return min(dist.get_process_group_ranks(shared[0])) if shared else own_rank()
