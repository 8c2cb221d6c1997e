"""Logging figures of our own on the step axis that `self.log` uses."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer


def log_figures(trainer: Trainer, prefix: str, figures: Mapping[str, float]) -> None:
    """Log figures to every logger, one row each, under ``prefix/``.

    The step is Lightning's own for `self.log`, kept in a private field (2.5 to 2.6): ``trainer.global_step`` is
    ahead of it by one at a batch's end. Between batches, as at an epoch's end, it has already moved on to the next
    one, and Lightning logs to the one before.
    """
    if not trainer.loggers:
        return
    step, progress = trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.fit_loop.epoch_loop.batch_progress
    batch_is_over = progress.current.completed == progress.current.ready
    if trainer.training and batch_is_over:
        step = max(step - 1, 0)
    for logger in trainer.loggers:
        logger.log_metrics({f"{prefix}/{key}": value for key, value in figures.items()}, step=step)


def may_log(trainer: Trainer) -> bool:
    """Whether `self.log` reaches the loggers at this batch's end: every ``log_every_n_steps``, if it made a step."""
    automatic = trainer.lightning_module.automatic_optimization
    return bool(
        trainer._logger_connector.should_update_logs and not (automatic and trainer.fit_loop._should_accumulate())
    )
