"""SyncBN: the layer normalizes over the batches of several ranks as over one (paper, App. A.6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.ranks import get_world_size
from lightning_bn.core.sync_kernel import synced_batch_norm
from lightning_bn.layers.behavior import Behavior, has_behavior
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm


class Synced(Behavior):
    """In train mode, batch statistics over all ranks of a group take the place of the rank's own.

    A layer in eval mode, frozen or in batch mode does what it does without: no rank waits for another there, in
    whatever order the behaviors were given.

    Args:
        layers: Qualified name -> layer.
        group: The ranks that share statistics, this one among them; None for all.
    """

    kind = "sync"

    def __init__(self, layers: Mapping[str, _BatchNorm], group: ProcessGroup | None) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self.group = group
        self.num_ranks = get_world_size(group)
        """Ranks that share statistics: the normalization batch is the sum of their batches."""
        self.name = f"synced over {self.num_ranks} ranks"

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Run the layer's own ``forward``, with the one ``batch_norm`` in it over all ranks."""
        if not layer.training or has_behavior(layer, "batch mode"):
            return forward(input)
        return self._over_ranks(layer, forward, input)

    def normalization_batch(self, samples: float) -> float:
        """Those of all its ranks, if each has as many as this one."""
        return samples * self.num_ranks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _over_ranks(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        return replace_batch_norm(self._batch_norm, self._names[layer], forward, input)

    def _batch_norm(self, call: BatchNormCall) -> Tensor:
        if not call.training:  # frozen by a behavior nearer to the layer
            return call.run()
        input, running_mean, running_var, weight, bias, _, momentum, eps = call
        return synced_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, self.group)
