"""Base of the monitors: errors within a fit become warnings."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.core.ranks import OUT_OF_MEMORY


class ObservingCallback(BatchNormCallback):
    """Observe, and warn of each problem once per fit."""

    _warned: frozenset[str] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._warned = frozenset()

    @contextmanager
    def _errors_as_warnings(self, failed: str) -> Iterator[None]:
        try:
            yield
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            cause = str(error) if type(error) in (ValueError, RuntimeError) else f"{type(error).__name__}: {error}"
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            # Messages may differ from batch to batch, so the place is the key.
            self._warn_once(f"{type(self).__name__} {failed}: {cause}", f"{failed}, {frame.f_code.co_filename}:{line}")

    def _warn_once(self, message: str, key: str = "") -> None:
        if (key or message) not in self._warned:
            rank_zero_warn(message)
        self._warned |= {key or message}

    def _has_callback(self, trainer: Trainer, name: str, layer: str) -> bool:
        return any(
            name in (kind.__name__ for kind in type(callback).__mro__)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, BatchNormCallback) and layer in callback.chosen_layers(trainer.lightning_module)
        )
