"""The bases of callbacks on chosen BatchNorm layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.conflicts import find_conflict
from lightning_bn.layers.find import Layers, as_patterns, find_bn
from lightning_bn.trainer.compat import state_key
from lightning_bn.trainer.passes import PassResult, check_sharding


class BatchNormCallback(Callback):
    """Act on the BatchNorm layers chosen by ``layers``."""

    layers: Layers
    kind: str
    """Names its feature in `lightning_bn.layers.conflicts`."""

    def __init_subclass__(cls) -> None:
        """Let `on_fit_start` refuse two callbacks of one class, with the names of their layers."""
        super().__init_subclass__()
        if "state_dict" in vars(cls):  # Lightning compares it by __wrapped__, and would refuse them without the names
            vars(cls)["state_dict"].__wrapped__ = Callback.state_dict

    @property
    def state_key(self) -> str:
        return state_key(self, layers=as_patterns(self.layers))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_overlap(trainer, pl_module)

    def on_population_pass(self, trainer: Trainer, result: PassResult) -> None:
        """Observe the statistics that a callback has just written."""

    def chosen_layers(self, module: LightningModule) -> dict[str, _BatchNorm]:
        """Return the layers that the callback acts on, by qualified name."""
        return find_bn(module, self.layers)

    def _check_overlap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = self.chosen_layers(pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, BatchNormCallback) or not self._stages_overlap(other):
                continue
            reason = find_conflict(self.kind, other.kind)
            shared = [name for name in other.chosen_layers(pl_module) if name in layers] if reason else []
            if shared:
                names = " and ".join(type(callback).__name__ for callback in (self, other))
                if type(other) is type(self):
                    names = f"Two {type(self).__name__}s"
                raise ValueError(
                    f"{names} act on layer {shared[0]!r} ({len(shared)} in all): {reason}. Remove one of them, or give "
                    "them layers= patterns that do not overlap."
                )

    def _stages_overlap(self, other: BatchNormCallback) -> bool:
        # callbacks without ``stages`` act in all that concern the other
        stages, others = (getattr(c, "stages", None) for c in (self, other))
        return stages is None or others is None or bool(set(stages) & set(others))

    def _notify_population_pass(self, trainer: Trainer, result: PassResult) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BatchNormCallback):
                callback.on_population_pass(trainer, result)

    def _move_behind_statistics_callbacks(self, trainer: Trainer) -> None:
        # Lightning calls hooks in the order of the list
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        place = 1 + max((i for i, c in enumerate(others) if isinstance(c, BatchNormCallback)), default=-1)
        if place > trainer.callbacks.index(self):  # type: ignore[attr-defined]
            # a new list, because Lightning may iterate over the old one
            trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]


class FitScopedCallback(BatchNormCallback, ABC):
    """Give layers a behavior from the start of a fit to its end."""

    def __init__(self) -> None:
        self._handle: Handle | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the first hook with the final layers: of configure_model, converted, on their device, within DDP
        super().on_fit_start(trainer, pl_module)
        check_sharding(trainer)
        self._handle = self._attach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}

    @abstractmethod
    def _attach(self, module: LightningModule) -> Handle: ...

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.undo()
            self._handle = None


def as_stages(argument: str, given: Any) -> tuple[str, ...]:
    """Return the evaluation stages as a tuple; refuse others than ``"validate"``, ``"test"`` and ``"predict"``."""
    if not isinstance(given, (list, tuple)) or any(stage not in ("validate", "test", "predict") for stage in given):
        raise ValueError(f"{argument} must be a list of some of 'validate', 'test' and 'predict' but is {given!r}.")
    return tuple(given)
