"""FrozenBN for the last epochs: training and evaluation use the same, constant statistics (paper, Sec. 4.3)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.functional.freeze import affine_of, check_lbfgs, drop_gradients, freeze_bn
from lightning_bn.functional.warm_up import WarmUp
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import Layers, storing_layers
from lightning_bn.trainer.averaging import check_with_swa
from lightning_bn.trainer.failures import Failures, OnError, check_on_error
from lightning_bn.trainer.forward import Forward
from lightning_bn.trainer.loaders import Source
from lightning_bn.trainer.logging import log_row, may_log
from lightning_bn.trainer.moved_layers import TOLD_BY_STATISTICS, Movement, as_made
from lightning_bn.trainer.normalization_batch import normalization_batch_size
from lightning_bn.trainer.pass_config import PassConfig
from lightning_bn.trainer.passes import PassResult, PopulationPass
from lightning_bn.trainer.schedule import SwitchPoint

_MAX_HELPFUL_NBS = 16
"""Normalization batch size from which the paper found freezing to cost accuracy (Fig. 5 and 6)."""


class FreezeBNCallback(BatchNormCallback):
    """Switch BatchNorm to FrozenBN for the rest of a fit: constant population statistics in training, too (Sec. 4.3).

    At the switch the statistics are recomputed by a PreciseBN pass, then frozen; layers normalize with them whatever
    ``train()`` calls follow, and the learning rate warms up linearly for one epoch, as in the paper. Layers thaw at
    the end of the fit.

    When it helps: the normalization batch holds 8 samples or fewer (validation error 32.5 -> 25.2 % at 2, 26.4 ->
    24.3 at 4, both against PreciseBN), and in fine-tuning. When it does not: from 16 samples on it costs accuracy
    (23.5 -> 23.9 at 16, 23.7 -> 24.5 at 1024; Fig. 5 and 6), of which it warns; and a network does not train from
    the start with frozen statistics, of which it warns as well.

    Cost: one pass at the switch; steps get cheaper after it.

    Args:
        last_n_epochs: Freeze for so many last epochs; the paper took 20 of 100. Exactly one of the first four is given.
        start_epoch: Freeze from the start of this epoch (the first is 0).
        start_step: Freeze from this optimizer step (``trainer.global_step``) on.
        start_fraction: Freeze from this fraction of the fit on, by its epochs or its steps, whichever end it sooner.
        statistics: ``"precise"`` recomputes them at the switch, ``"ema"`` keeps the running statistics.
        affine: Freeze ``weight`` and ``bias`` as well: their gradients are dropped before clipping and stepping, and
            ``requires_grad`` stays as it is.
        warmup_epochs: Length of the learning-rate warm-up after the switch; 0 for none.
        warmup_steps: The same in steps of each optimizer, for epochs of unknown length.
        num_samples: Samples of the pass; see `PreciseBNCallback`, as for the next three.
        source: Where the pass gets batches from.
        forward: How the pass shows them to the module.
        batch_size_fn: Number of samples in a batch.
        layers: Glob patterns over qualified layer names; None for every layer that stores statistics.
        on_error: What happens if the pass at the switch fails: ``"warn"`` says why and freezes the running statistics
            as they are, since training got so far without a pass; ``"raise"`` ends the fit.

    Raises:
        ValueError: At construction or fit start, naming the way out, if the switch cannot be placed or made.
        TypeError: At fit start, if ``affine`` and an optimizer is LBFGS.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import FreezeBNCallback
        >>> trainer = Trainer(
        ...     max_epochs=100, callbacks=[FreezeBNCallback(last_n_epochs=20)], logger=False, enable_checkpointing=False
        ... )

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.FreezeBNCallback
              init_args: {last_n_epochs: 20, affine: false}
        ```
    """

    kind = "frozen"

    def __init__(
        self,
        last_n_epochs: int | None = None,
        start_epoch: int | None = None,
        start_step: int | None = None,
        start_fraction: float | None = None,
        statistics: Literal["precise", "ema"] = "precise",
        affine: bool = False,
        warmup_epochs: float = 1.0,
        warmup_steps: int | None = None,
        num_samples: int = 1000,
        source: Source = "train_dataloader",
        forward: Forward = "training_step",
        batch_size_fn: BatchSizeFn | None = None,
        layers: Layers = None,
        on_error: OnError = "warn",
    ) -> None:
        check_bool("affine", affine)
        check_on_error(on_error)
        if statistics not in ("precise", "ema"):
            raise ValueError(f"statistics must be 'precise' or 'ema' but is {statistics!r}.")
        if not isinstance(warmup_epochs, (int, float)) or not 0 <= warmup_epochs < float("inf"):
            raise ValueError(f"warmup_epochs must be a number of at least 0 but is {warmup_epochs!r}.")
        if warmup_steps is not None:
            check_int("warmup_steps", warmup_steps, at_least=0)
        self.switch_point = SwitchPoint(last_n_epochs, start_epoch, start_step, start_fraction)
        self.statistics = statistics
        self.affine = affine
        self.warmup_epochs = warmup_epochs
        self.warmup_steps = warmup_steps
        self.layers = layers
        self._count = as_batch_size_fn(batch_size_fn)
        self.on_error: OnError = on_error
        self._pass = PopulationPass(
            PassConfig(num_samples, source, forward, layers, batch_size_fn), type(self).__name__
        )
        self._start = Movement({})
        self._state: dict[str, Any] | None = None
        self._handle: Handle | None = None
        self._warm_up: WarmUp | None = None
        self._affine: list[Tensor] = []

    def should_freeze(self, trainer: Trainer, batch_idx: int) -> bool:
        """Whether training has come to the switch; override to decide otherwise."""
        return self.switch_point.reached(trainer, batch_idx)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state; a checkpoint is restored after this."""
        if stage == "fit":
            self._state = None
            self._pass.begin()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the configuration before training starts."""
        super().on_fit_start(trainer, pl_module)
        check_with_swa(trainer, self)
        self.switch_point.check(trainer, type(self).__name__)
        layers = storing_layers(pl_module, self.layers)
        self._start = Movement(layers)
        self._affine = affine_of(layers.values()) if self.affine else []
        if self.affine:
            for optimizer in trainer.optimizers:
                check_lbfgs(optimizer, self._affine)
        if self.statistics == "precise":
            self._pass.check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze again what was frozen when the checkpoint was written; its statistics are in there."""
        if self.statistics == "precise":
            self._pass.check_loader(trainer)
        if self._warmup_length(trainer) and not all(hasattr(o, "register_step_pre_hook") for o in trainer.optimizers):
            raise ValueError(
                "An optimizer has no step hooks, by which learning rates are warmed up: pass warmup_epochs=0."
            )
        self.freeze_again(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the switch, if it falls on this step."""
        if self._state is None:
            if self.statistics == "precise":
                self._pass.look_at(pl_module, batch)
            if self.should_freeze(trainer, batch_idx):
                with suppress(Exception):  # of a batch that cannot be counted: a warning is not worth a fit
                    self._warn_of_large_batches(trainer, pl_module, self._count(batch))
                self._switch(trainer, pl_module)

    def freeze_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what was frozen when the checkpoint was written, if that has not been done yet."""
        if self._state is not None and self._handle is None:
            self._freeze(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of a frozen affine, before they are clipped together with the others."""
        if self._handle is not None:
            drop_gradients(optimizer, self._affine)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Log the factor on the (first optimizer's) learning rate in this batch's step, while it warms up."""
        warm_up = self._warm_up
        if warm_up is not None and 0 < warm_up.done[0] <= warm_up.steps and may_log(trainer):
            log_row(trainer, {"freeze_bn/lr_factor": warm_up.done[0] / warm_up.steps})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the switch never came."""
        if self._state is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"FreezeBNCallback never froze anything: the fit ended after epoch {trainer.current_epoch} and step "
                f"{trainer.global_step}, before {self.switch_point}."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Thaw, and leave no learning rate scaled."""
        self._thaw()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Thaw."""
        self._thaw()

    def state_dict(self) -> dict[str, Any]:
        """The step of the switch, the length of the warm-up, and how far each optimizer has come in it."""
        if self._state is None:
            return {}
        return {
            **self._state,
            "warmup_done": list(self._warm_up.done) if self._warm_up else self._state["warmup_done"],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the callback state; on_train_start freezes."""
        self._state = dict(state_dict) or None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the state, not the hold on layers and optimizers."""
        return {**vars(self), "_state": self.state_dict() or None, "_handle": None, "_warm_up": None, "_affine": []}

    def _switch(self, trainer: Trainer, module: LightningModule) -> None:
        untrained = as_made(storing_layers(module, self.layers))
        recomputed: PassResult | None = None
        if self.statistics == "precise":
            kept = "the running statistics are frozen as they are"
            failures = Failures(type(self).__name__, "freeze_bn/failed", kept, self.on_error, succeeded=True)
            recomputed = failures.attempt(trainer, lambda: self._recompute(trainer, module))
            self._pass.begin()
        if recomputed:
            log_row(trainer, recomputed.to_metrics("freeze_bn"))
            self._notify_population_pass(trainer, recomputed)
        self._warn_of_untrained(trainer, untrained, recomputed)
        self._state = {
            "step": trainer.global_step,
            "warmup_steps": self._warmup_length(trainer),
            "warmup_done": [0] * len(trainer.optimizers),
        }
        self._freeze(trainer, module)

    def _recompute(self, trainer: Trainer, module: LightningModule) -> PassResult | None:
        reason = self._pass.skip_reason(trainer, module)
        if reason:
            rank_zero_warn(f"FreezeBNCallback freezes the running statistics as they are: {reason}.")
            return None
        return self._pass.run(trainer, module)

    def _freeze(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._state is not None
        # affine: for optimizers that the user steps past Lightning; on_before_optimizer_step comes before clipping
        self._handle = freeze_bn(module, layers=self.layers, affine=self.affine)
        if self._state["warmup_steps"]:
            self._warm_up = WarmUp(trainer.optimizers, self._state["warmup_steps"], self._state["warmup_done"])

    def _thaw(self) -> None:
        if self._state is not None:
            self._state = self.state_dict()
        for undone in (self._handle, self._warm_up):
            if undone is not None:
                undone.undo()
        self._handle = self._warm_up = None

    def _warmup_length(self, trainer: Trainer) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        if not self.warmup_epochs:
            return 0
        if trainer.num_training_batches == float("inf"):
            raise ValueError(
                "An epoch has no known length, so warmup_epochs cannot be counted in steps: pass warmup_steps."
            )
        steps_an_epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        return max(1, round(self.warmup_epochs * steps_an_epoch))

    def _warn_of_untrained(
        self, trainer: Trainer, untrained: dict[str, _BatchNorm], recomputed: PassResult | None
    ) -> None:
        called = self._start.of(untrained, TOLD_BY_STATISTICS)
        reached = {*called, *(recomputed.statistics if recomputed else ())}
        nobody_knows = recomputed is None and trainer.global_step == 0
        names = [name for name in untrained if name in reached or nobody_knows]  # others are never called
        if names:
            rank_zero_warn(
                "FreezeBNCallback freezes statistics that were never trained (mean 0 and variance 1 in "
                f"{len(names)} layers, {names[0]!r} first). A network does not train from the start with "
                "frozen statistics (Sec. 4.3): freeze later, or load trained weights."
            )

    def _warn_of_large_batches(self, trainer: Trainer, module: LightningModule, samples: int) -> None:
        sizes = normalization_batch_size(trainer, module, samples=samples, layers=self.layers)
        size = max((sizes[n] for n in storing_layers(module, self.layers) if sizes[n] >= _MAX_HELPFUL_NBS), default=0)
        if size:
            rank_zero_warn(
                f"FreezeBNCallback freezes layers whose normalization batch holds {size:g} samples. In the paper "
                "FrozenBN helps up to 8 and costs accuracy from 16 on (validation error 23.5 -> 23.9 % at 16, 23.7 "
                "-> 24.5 at 1024; Fig. 5 and 6)."
            )
