"""Averaged weights: `WeightAveraging` keeps a second model, which validation and checkpoints use.

It swaps that model's values into the module for the time of a validation. A pass in there is a pass on the averaged
weights; outside, the same swap has to be made for it. Known by its methods, so that `pytorch_lightning`'s is
recognized, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def averagers(trainer: Trainer) -> list[Any]:
    """The Trainer's WeightAveraging callbacks."""
    return [c for c in trainer.callbacks if hasattr(c, "_swap_models") and hasattr(c, "_average_model")]  # type: ignore[attr-defined]


def check_before_averaging(trainer: Trainer, callback: Callback) -> None:
    """Raise if ``callback`` stands before a WeightAveraging callback, which would then average over what it writes.

    Raises:
        ValueError: Naming the two to swap.
    """
    order = trainer.callbacks  # type: ignore[attr-defined]
    for averager in averagers(trainer):
        if order.index(averager) > order.index(callback):
            ours, theirs = type(callback).__name__, type(averager).__name__
            raise ValueError(
                f"{ours} stands before {theirs} in Trainer(callbacks=...), so an epoch's last average would come "
                f"after the statistics meant for it: swap them, {theirs} first."
            )


def check_with_swa(trainer: Trainer, callback: Callback) -> None:
    """Raise if StochasticWeightAveraging is there: it ends by resetting all running statistics, frozen ones as well.

    Raises:
        ValueError: Naming the way out.
    """
    kinds = {c.__name__ for other in trainer.callbacks for c in type(other).__mro__}  # type: ignore[attr-defined]
    if "StochasticWeightAveraging" in kinds:
        raise ValueError(
            "StochasticWeightAveraging resets all running statistics at the end and re-estimates them in training "
            f"mode, which {type(callback).__name__} has frozen: use WeightAveraging instead."
        )


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Swap averaged weights into the module, where there are any and they are not in it already."""
    swapped = [a for a in averagers(trainer) if a._average_model is not None and not trainer.validating]
    for averager in swapped:
        averager._swap_models(module)
    try:
        yield
    finally:
        for averager in reversed(swapped):
            averager._swap_models(module)


def weights_version(trainer: Trainer) -> tuple[int, ...]:
    """Changes whenever the weights that a checkpoint would hold do: by optimizer steps, and updates of averages."""
    averages = (a._average_model for a in averagers(trainer))
    return (trainer.global_step, *(int(m.n_averaged) for m in averages if m is not None))
