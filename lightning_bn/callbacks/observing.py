"""What observers share: nothing that they meet in a fit ends it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.core.ranks import OUT_OF_MEMORY


class ObservingCallback(BatchNormCallback):
    """A callback that only looks, and what it says once a fit."""

    _said: frozenset[str] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the one-time warnings."""
        self._said = frozenset()

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """Go on after an error in here, and say once ``what`` it was in the way of."""
        try:
            yield
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            cause = str(error) if type(error) in (ValueError, RuntimeError) else f"{type(error).__name__}: {error}"
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            # by its place: a message may hold what differs from batch to batch
            self._say(f"{type(self).__name__} {what}: {cause}", key=f"{what}, {frame.f_code.co_filename}:{line}")

    def _say(self, message: str, key: str = "") -> None:
        if (key or message) not in self._said:
            rank_zero_warn(message)
        self._said |= {key or message}

    def _present(self, trainer: Trainer, layer: str | None = None) -> set[str]:
        """Names of the classes of the Trainer's callbacks, of those that act on ``layer`` if one is given."""
        return {
            kind.__name__
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, BatchNormCallback)
            and (layer is None or layer in callback.chosen_layers(trainer.lightning_module))
            for kind in type(callback).__mro__
        }
