"""The context of a pass: the Trainer, its module, the modules' modes in training, and the layers to estimate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.precise import estimable_layers
from lightning_bn.layers.find import Layers
from lightning_bn.layers.modes import keep_in_eval
from lightning_bn.trainer.compat import recorded_modes
from lightning_bn.trainer.held_state import is_lightning_module


@dataclass(frozen=True)
class PassContext:
    """Holds the surroundings of one pass."""

    trainer: Trainer
    module: LightningModule
    modes: dict[nn.Module, bool]  # whether in train mode at the last training batch
    layers: dict[str, _BatchNorm]  # to estimate: chosen, not frozen, in train mode when the model trains

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule, layers: Layers) -> PassContext:
        """Create the context of a pass that begins now, over the layers that the patterns match."""
        modes = modes_of_training(trainer, module)
        return cls(trainer, module, modes, estimable_layers(module, layers, modes.__getitem__))

    @property
    def device(self) -> torch.device:
        return self.module.device


def modes_of_training(trainer: Trainer, module: LightningModule) -> dict[nn.Module, bool]:
    """Return the mode of each module at the last training batch.

    Outside a fit, if the whole model is in eval mode, all modules count as in train mode.
    """
    recorded = recorded_modes(trainer)
    if recorded is None:
        return {m: m.training for m in module.modules()}
    if trainer.state.fn != "fit" and not recorded.get("", False):
        return dict.fromkeys(module.modules(), True)
    return {m: recorded.get(name, m.training) for name, m in module.named_modules()}


@contextmanager
def set_modes(
    modes: dict[nn.Module, bool], like_training: bool, estimated: Collection[nn.Module]
) -> Iterator[Callable[[], None]]:
    """Set the modes for a pass: eval, except for the ``estimated`` layers and modules that a training step needs.

    With ``like_training``, modules with children keep their mode in training: a step may return something else in eval
    mode (torchvision's detectors do). Dropout, attention and other BatchNorm layers are in eval mode, also after a step
    has called `train()`. Yields a function to call before each forward, because steps set modes.
    """
    estimated = set(estimated)
    wanted = {m: m in estimated or (mode and like_training and _mode_may_change_output(m)) for m, mode in modes.items()}

    def begin() -> None:
        for m, mode in wanted.items():
            if m.training != mode:
                m.training = mode

    with keep_in_eval([m for m in modes if m not in estimated and not _mode_may_change_output(m)]):
        begin()
        yield begin


def _mode_may_change_output(m: nn.Module) -> bool:
    # may decide which outputs there are, rather than how noisy they are
    if isinstance(m, (_BatchNorm, nn.MultiheadAttention)):
        return False
    return next(m.children(), None) is not None or is_lightning_module(m)


@contextmanager
def batch_domain(trainer: Trainer, batch: Any, dataloader_idx: int = 0) -> Iterator[None]:
    """Let the callbacks with domains set the domain of a batch outside Lightning's loops."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "use_domain_of"):
                stack.enter_context(callback.use_domain_of(batch, dataloader_idx))
        yield
