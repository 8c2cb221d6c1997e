"""Modes: which modules are in training mode while batches are shown to a fixed model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_bn.engine.owned import is_lightning_module


def modes_of_training(trainer: Trainer, module: LightningModule) -> dict[nn.Module, bool]:
    """The mode each module had at the last training batch.

    While a loop evaluates, every module is in eval; what it was before sits in a private field of the loop (Lightning
    2.5 to 2.6). Outside a fit, a model that was in eval as a whole says nothing: all count as in training mode. While
    no loop runs, modules are in the modes they have.
    """
    loop: Any = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else trainer._active_loop
    if loop is None or (trainer.state.fn == "fit" and not trainer.validating):
        return {m: m.training for m in module.modules()}
    recorded = loop._module_mode.mode
    if trainer.state.fn != "fit" and not recorded.get("", False):
        return dict.fromkeys(module.modules(), True)
    return {m: recorded.get(name, m.training) for name, m in module.named_modules()}


def set_modes(modes: dict[nn.Module, bool], like_training: bool) -> None:
    """Put modules into the modes for a pass: eval, but for what a training step needs.

    A training step may return other things in eval mode (torchvision's detectors do), and that is decided by modules
    that contain others. These keep the mode they had; modules that contain none, Dropout and DropPath and
    StochasticDepth of whatever make among them, go to eval, as does attention, whose dropout is its own.
    """
    for m, mode in modes.items():
        contains = next(m.children(), None) is not None and not isinstance(m, nn.MultiheadAttention)
        m.training = mode and like_training and (contains or is_lightning_module(m))
