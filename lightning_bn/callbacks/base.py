"""What every callback on chosen BatchNorm layers shares: a key for its state, and no two of a kind on one layer."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bn.layers.find import Layers, as_patterns, find_bn


class BatchNormCallback(Callback):
    """A callback that acts on the BatchNorm layers chosen by ``layers``."""

    layers: Layers

    @property
    def state_key(self) -> str:
        """Differs between callbacks of one class on different layers: their states would overwrite each other."""
        return self._generate_state_key(layers=as_patterns(self.layers))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse another callback of this class on the same layers."""
        own = find_bn(pl_module, self.layers)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if type(other) is type(self) and other is not self:
                shared = [name for name in find_bn(pl_module, other.layers) if name in own]
                if shared:
                    raise ValueError(
                        f"Two {type(self).__name__}s act on layer {shared[0]!r} ({len(shared)} in all): give them "
                        "layers= patterns that do not overlap."
                    )
