"""SyncBN: the layer normalises over the batches of several ranks as over one (paper, App. A.6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.distributed.batch_norm import synced_batch_norm
from lightning_bn.distributed.moments import num_ranks
from lightning_bn.layers.batch_mode import BatchMode
from lightning_bn.layers.batch_norm_call import with_batch_norm
from lightning_bn.layers.behaviour import Behaviour, behaves


class Synced(Behaviour):
    """In train mode, batch statistics over all ranks of a group take the place of the rank's own.

    A layer in eval mode, frozen or in batch mode does what it does without: no rank waits for another there, in
    whatever order the behaviours were given.

    Args:
        layers: Qualified name -> layer.
        group: The ranks that share statistics, this one among them; None for all.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], group: ProcessGroup | None) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self.group = group
        self.num_ranks = num_ranks(group)
        """Ranks that share statistics: the normalization batch is the sum of their batches."""
        self.name = f"synced over {self.num_ranks} ranks"

    def forward(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Run the layer's own ``forward``, with the one ``batch_norm`` in it over all ranks."""
        if not layer.training or behaves(layer, BatchMode):
            return forward(input)
        output: Tensor = self._over_ranks(layer, forward, input)
        return output

    def normalization_batch(self, samples: float) -> float:
        """Those of all its ranks, if each has as many as this one."""
        return samples * self.num_ranks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _over_ranks(self, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        return with_batch_norm(self._batch_norm, self._names[layer], forward, input)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:  # frozen by a behaviour nearer to the layer
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return synced_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, self.group)
