"""What callbacks share whose layers behave differently from the start of a fit to its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.layers.behavior import Handle
from lightning_bn.trainer.passes import check_sharding


class FitScopedCallback(BatchNormCallback, ABC):
    """Gives layers a behavior when a fit starts, and takes it back when it ends, however it ends.

    At ``on_fit_start``, because that is the first hook at which the layers are those that will train: made by
    ``configure_model``, converted by ``Trainer(sync_batchnorm=True)``, on their device, within DDP, and the process
    group is there. There is no state: a fit that is resumed starts like any other.
    """

    def __init__(self) -> None:
        self._handle: Handle | None = None

    @abstractmethod
    def _give(self, module: LightningModule) -> Handle:
        """Give the layers their behavior."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be done; give."""
        super().on_fit_start(trainer, pl_module)
        check_sharding(trainer)
        self._handle = self._give(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the behavior."""
        self._take_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the behavior."""
        self._take_back()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hold on layers."""
        return {**vars(self), "_handle": None}

    def _take_back(self) -> None:
        if self._handle is not None:
            self._handle.undo()
            self._handle = None
