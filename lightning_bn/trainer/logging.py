"""Logging rows of our own on the step axis that `self.log` uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lightning.pytorch import Trainer


def log_row(trainer: Trainer, row: Mapping[str, float]) -> None:
    """Log figures by their full keys to every logger, all in one row, at `log_step`."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(row), step=log_step(trainer))


def log_step(trainer: Trainer) -> int:
    """The step at which `self.log` logs now.

    It is kept in a private field (2.5 to 2.6): ``trainer.global_step`` is ahead of it by one at a batch's end.
    Between batches, as at an epoch's end, it has already moved on to the next one, and Lightning logs to the one
    before.
    """
    step, progress = trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.fit_loop.epoch_loop.batch_progress
    batch_is_over = progress.current.completed == progress.current.ready
    return max(step - 1, 0) if trainer.training and batch_is_over else step


def may_log(trainer: Trainer) -> bool:
    """Whether `self.log` reaches the loggers at this batch's end: every ``log_every_n_steps``, if it made a step."""
    automatic = trainer.lightning_module.automatic_optimization
    return bool(
        trainer._logger_connector.should_update_logs and not (automatic and trainer.fit_loop._should_accumulate())
    )


def safe_keys(names: Iterable[str]) -> dict[str, str]:
    """Layer names as parts of metric keys: letters, digits and underscores (W&B takes a dot for a path), all different.

    Example:
        >>> safe_keys(["layer1.0.bn1", "layer1.0_bn1"])
        {'layer1.0.bn1': 'layer1_0_bn1', 'layer1.0_bn1': 'layer1_0_bn1_1'}
    """
    keys: dict[str, str] = {}
    for index, name in enumerate(names):
        key = re.sub(r"\W", "_", name)
        keys[name] = f"{key}_{index}" if key in keys.values() else key
    return keys
