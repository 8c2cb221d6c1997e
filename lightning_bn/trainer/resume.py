"""What a resumed fit does not make up for."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def validation_was_skipped(trainer: Trainer) -> bool:
    """Whether, at the start of a resumed training, a validation or an epoch's end was due and will not come.

    A checkpoint that is written at a batch's end (``every_n_train_steps``) is written before the validation and the
    epoch's end that this batch brings. Lightning (private, 2.5 to 2.6) then goes on with the next batch.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if not getattr(loop, "restarted_on_train_batch_end", False):
        return False
    return bool(loop.batch_progress.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher))
