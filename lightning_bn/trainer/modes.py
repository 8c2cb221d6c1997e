"""Modes: which modules are in training mode while batches are shown to a fixed model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.modes import keep_in_eval
from lightning_bn.trainer.stateful_objects import is_lightning_module


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


@contextmanager
def set_modes(
    modes: dict[nn.Module, bool], like_training: bool, estimated: Collection[nn.Module]
) -> Iterator[Callable[[], None]]:
    """Put modules into the modes for a pass: eval, but for the layers to estimate and what a training step needs.

    A training step may return other things in eval mode (torchvision's detectors do), and that is decided by modules
    that contain others. These keep the mode they had. What contains none (Dropout, DropPath, StochasticDepth, of
    whatever make), attention, whose dropout is its own, and every BatchNorm layer that is not estimated, whatever it
    contains, are in eval, also after a step has called `train()`.

    Args:
        modes: Each module and its mode at the last training batch.
        like_training: Whether the training step is run.
        estimated: Layers whose statistics are estimated.

    Yields:
        What undoes at the beginning of a forward what the one before has set. Modes are left as they are in the end.
    """
    wanted = {m: m in estimated or (mode and like_training and _decides(m)) for m, mode in modes.items()}

    def begin() -> None:
        for m, mode in wanted.items():
            if m.training != mode:
                m.training = mode

    with keep_in_eval([m for m in modes if m not in estimated and not _decides(m)]):
        begin()
        yield begin


def _decides(m: nn.Module) -> bool:
    """Whether a module's mode may decide what it returns, rather than how noisy that is."""
    if isinstance(m, (_BatchNorm, nn.MultiheadAttention)):
        return False
    return next(m.children(), None) is not None or is_lightning_module(m)
