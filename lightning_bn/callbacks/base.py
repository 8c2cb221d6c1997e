"""What callbacks on chosen BatchNorm layers share: a key for their state, no two on a layer, their order, news."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.conflicts import find_conflict
from lightning_bn.layers.find import Layers, as_patterns, find_bn
from lightning_bn.trainer.compat import state_key
from lightning_bn.trainer.passes import PassResult


class BatchNormCallback(Callback):
    """A callback that acts on the BatchNorm layers chosen by ``layers``."""

    layers: Layers
    kind: str
    """Names its feature in `lightning_bn.layers.conflicts`."""

    def __init_subclass__(cls) -> None:
        """Let two callbacks of one class on the same layers come to `on_fit_start`, which names the layers.

        Lightning refuses two states of one key itself, in words of its own, where it finds that ``state_dict`` is not
        `Callback`'s. It looks at what a function wraps.
        """
        super().__init_subclass__()
        if "state_dict" in vars(cls):
            vars(cls)["state_dict"].__wrapped__ = Callback.state_dict

    @property
    def state_key(self) -> str:
        """Differs between callbacks of one class on different layers: their states would overwrite each other."""
        return state_key(self, layers=as_patterns(self.layers))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse another callback of this class on the same layers, and others with which it makes no sense there."""
        self._check_overlap(trainer, pl_module)

    def chosen_layers(self, module: LightningModule) -> dict[str, _BatchNorm]:
        """The layers it acts on, by name."""
        return find_bn(module, self.layers)

    def _check_overlap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = self.chosen_layers(pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, BatchNormCallback) or not self._stages_overlap(other):
                continue
            reason = find_conflict(self.kind, other.kind)
            shared = [name for name in other.chosen_layers(pl_module) if name in own] if reason else []
            if shared:
                names = " and ".join(type(callback).__name__ for callback in (self, other))
                if type(other) is type(self):
                    names = f"Two {type(self).__name__}s"
                raise ValueError(
                    f"{names} act on layer {shared[0]!r} ({len(shared)} in all): {reason}. Remove one of them, or give "
                    "them layers= patterns that do not overlap."
                )

    def _stages_overlap(self, other: BatchNormCallback) -> bool:
        """Whether both act in one stage; those that name none act in every one that concerns the other."""
        own, others = (getattr(c, "stages", None) for c in (self, other))
        return own is None or others is None or bool(set(own) & set(others))

    def on_population_pass(self, trainer: Trainer, recomputed: PassResult) -> None:
        """A hook of our own: a callback has recomputed population statistics and written them."""

    def _notify_population_pass(self, trainer: Trainer, recomputed: PassResult) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BatchNormCallback):
                callback.on_population_pass(trainer, recomputed)

    def _move_behind_statistics_callbacks(self, trainer: Trainer) -> None:
        """Hooks run in the order of the list: one that looks at statistics comes after those that change them."""
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        place = 1 + max((i for i, c in enumerate(others) if isinstance(c, BatchNormCallback)), default=-1)
        if place > trainer.callbacks.index(self):  # type: ignore[attr-defined]
            # a new list: Lightning may be going through the old one
            trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]


def as_stages(argument: str, given: Any) -> tuple[str, ...]:
    """The stages named by an argument: some of ``"validate"``, ``"test"`` and ``"predict"``.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(given, (list, tuple)) or any(stage not in ("validate", "test", "predict") for stage in given):
        raise ValueError(f"{argument} must be a list of 'validate', 'test' and 'predict' but is {given!r}.")
    return tuple(given)
