"""WeightAveraging: a second model, whose values are swapped into the module for validation and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bn.trainer.compat import averaged_model, swap_averaged_model, weight_averagers


def check_before_averaging(trainer: Trainer, callback: Callback) -> None:
    """Raise ValueError if ``callback`` is before a WeightAveraging callback in the list."""
    order = trainer.callbacks  # type: ignore[attr-defined]
    for averager in weight_averagers(trainer):
        if order.index(averager) > order.index(callback):
            ours, theirs = type(callback).__name__, type(averager).__name__
            raise ValueError(
                f"{ours} is before {theirs} in Trainer(callbacks=...), so the last average of an epoch would overwrite "
                f"its statistics: swap them, {theirs} first."
            )


def check_with_swa(trainer: Trainer, callback: Callback) -> None:
    """Raise ValueError if there is a StochasticWeightAveraging."""
    kinds = {c.__name__ for other in trainer.callbacks for c in type(other).__mro__}  # type: ignore[attr-defined]
    if "StochasticWeightAveraging" in kinds:
        raise ValueError(
            "StochasticWeightAveraging resets all running statistics at the end and re-estimates them in training "
            f"mode, which {type(callback).__name__} has frozen: use WeightAveraging instead."
        )


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Swap averaged weights into the module, if there are any and no validation has done so."""
    swapped = [a for a in weight_averagers(trainer) if averaged_model(a) is not None and not trainer.validating]
    for averager in swapped:
        swap_averaged_model(averager, module)
    try:
        yield
    finally:
        for averager in reversed(swapped):
            swap_averaged_model(averager, module)


def weights_version(trainer: Trainer) -> tuple[int, ...]:
    """Return a value that changes with every optimizer step and every update of an average."""
    averages = map(averaged_model, weight_averagers(trainer))
    return (trainer.global_step, *(int(m.n_averaged) for m in averages if m is not None))
