"""A point of a fit: an epoch, a step, or a fraction of it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_bn.core.checks import check_int


@dataclass(frozen=True)
class SwitchPoint:
    """Defines the point of a fit at which a callback switches, in exactly one of four ways."""

    last_n_epochs: int | None = None
    start_epoch: int | None = None  # the first is 0
    start_step: int | None = None  # trainer.global_step
    start_fraction: float | None = None  # of the fit's epochs or steps, whichever end it sooner

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"Give exactly one of {', '.join(vars(self))}, the point of the switch; given: "
                f"{', '.join(given) or 'none'}."
            )
        (name, value), *_ = given.items()
        if name != "start_fraction":
            check_int(name, value, at_least=1 if name == "last_n_epochs" else 0)
        elif not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"start_fraction must be a number of at least 0 and below 1 but is {value!r}.")

    def check(self, trainer: Trainer, owner: str) -> None:
        """Raise ValueError for a fit without an end to count from, or with too few epochs."""
        endless = (trainer.max_epochs or -1) < 0
        if endless and (self.last_n_epochs is not None or (self.start_fraction is not None and trainer.max_steps < 0)):
            raise ValueError(
                f"{owner}: the Trainer has max_epochs={trainer.max_epochs}, so it has no end to count from: pass "
                "start_epoch or start_step."
            )
        epochs, debugging = trainer.max_epochs, trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.last_n_epochs is not None and epochs is not None and self.last_n_epochs > epochs and not debugging:
            raise ValueError(
                f"{owner}(last_n_epochs={self.last_n_epochs}) is more than the Trainer's max_epochs={epochs}: pass "
                f"at most {epochs}; start_epoch=0 freezes from the first step on."
            )

    def reached(self, trainer: Trainer, batch_idx: int) -> bool:
        """Return whether the fit has reached this point, before batch ``batch_idx`` of the current epoch."""
        if self.start_step is not None:
            return trainer.global_step >= self.start_step
        last_epoch, last_step = trainer.max_epochs or -1, trainer.max_steps
        if self.start_fraction is not None:
            epochs = trainer.current_epoch + (batch_idx / (trainer.num_training_batches or 1))
            by_epoch = epochs / last_epoch if last_epoch > 0 else 0.0
            by_step = trainer.global_step / last_step if last_step > 0 else 0.0
            return max(by_epoch, by_step) >= self.start_fraction
        first = last_epoch - self.last_n_epochs if self.last_n_epochs is not None else self.start_epoch
        return first is not None and trainer.current_epoch >= first
