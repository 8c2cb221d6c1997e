"""FreezeBN: in the last epochs, training uses the same constant statistics as evaluation (paper, Sec. 4.3)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.core.batch_sizes import as_batch_size_fn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.functional.freeze import affine_of, check_lbfgs, drop_gradients, freeze_bn
from lightning_bn.functional.normalization_batch import normalization_batch_size
from lightning_bn.functional.warm_up import WarmUp
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import Layers, storing_layers
from lightning_bn.trainer.averaging import check_with_swa
from lightning_bn.trainer.compat import logs_at_this_batch
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.failures import Failures, OnError, check_on_error
from lightning_bn.trainer.logging import log_row
from lightning_bn.trainer.pass_config import PassConfig
from lightning_bn.trainer.passes import STATISTICS_KEYS, LayerSnapshot, PassResult, PopulationPass, with_initial_stats
from lightning_bn.trainer.schedule import SwitchPoint

_HARMFUL_SIZE = 16
"""Normalization batch size from which freezing costs accuracy (Fig. 5 and 6)."""


class FreezeBNCallback(BatchNormCallback):
    """Train with constant population statistics (FrozenBN) from a chosen moment of a fit to its end (Sec. 4.3).

    At the switch, a pass of `PreciseBNCallback` recomputes the statistics. Then the learning rate warms up linearly for
    one epoch, as in the paper. Weight and bias of the layers still train, unless ``affine``.

    It helps at normalization batches of 8 samples or fewer, and in fine-tuning.
    It does not help from 16 samples on, nor from the start of training (Fig. 5 and 6). It warns of both.
    Cost: one pass at the switch; later steps are cheaper.

    Args:
        last_n_epochs: Freeze in the last n epochs; the paper took 20 of 100. Give exactly one of the first four.
        start_epoch: Freeze from the start of this epoch (the first is 0).
        start_step: Freeze from this optimizer step (``trainer.global_step``) on.
        start_fraction: Freeze from this fraction of the fit on, of its epochs or steps, whichever end it sooner.
        statistics: ``"precise"`` recomputes them at the switch; ``"ema"`` keeps the running statistics.
        affine: Freeze ``weight`` and ``bias`` as well, by dropping their gradients.
        warmup_epochs: Length of the learning-rate warm-up after the switch; 0 for none.
        warmup_steps: Length of the warm-up in steps of each optimizer, for epochs of unknown length.
        precise: The pass at the switch.
        layers: Glob patterns over qualified layer names; None for every layer that stores statistics.

    Attributes:
        on_error: ``"warn"``: if the pass fails, warn and freeze the running statistics as they are. ``"raise"`` ends
            the fit. Set it on the callback.

    Raises:
        ValueError: At construction or fit start, if the switch cannot be placed or made.
        TypeError: At fit start, if ``affine`` and an optimizer is LBFGS.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import FreezeBNCallback, PassConfig
        >>> freeze = FreezeBNCallback(last_n_epochs=20, precise=PassConfig(num_samples=2000))
        >>> trainer = Trainer(max_epochs=100, callbacks=[freeze], logger=False, enable_checkpointing=False)
    """

    kind = "frozen"
    on_error: OnError = "warn"

    def __init__(
        self,
        last_n_epochs: int | None = None,
        *,
        start_epoch: int | None = None,
        start_step: int | None = None,
        start_fraction: float | None = None,
        statistics: Literal["precise", "ema"] = "precise",
        affine: bool = False,
        warmup_epochs: float = 1.0,
        warmup_steps: int | None = None,
        precise: PassConfig = PassConfig(),  # noqa: B008 - frozen
        layers: Layers = None,
    ) -> None:
        check_bool("affine", affine)
        if statistics not in ("precise", "ema"):
            raise ValueError(f"statistics must be 'precise' or 'ema' but is {statistics!r}.")
        if not isinstance(warmup_epochs, (int, float)) or not 0 <= warmup_epochs < float("inf"):
            raise ValueError(f"warmup_epochs must be a number of at least 0 but is {warmup_epochs!r}.")
        if warmup_steps is not None:
            check_int("warmup_steps", warmup_steps, at_least=0)
        if not isinstance(precise, PassConfig):
            raise TypeError(f"precise must be a PassConfig, such as PassConfig(num_samples=1000), but is {precise!r}.")
        self.switch_point = SwitchPoint(last_n_epochs, start_epoch, start_step, start_fraction)
        self.statistics = statistics
        self.affine = affine
        self.warmup_epochs = warmup_epochs
        self.warmup_steps = warmup_steps
        self.precise = precise
        self.layers = layers
        self._pass = PopulationPass(precise, layers, type(self).__name__)
        self._at_start = LayerSnapshot({})
        self._state: dict[str, Any] | None = None  # set from the switch on
        self._handle: Handle | None = None
        self._warm_up: WarmUp | None = None
        self._affine: list[Tensor] = []

    def should_freeze(self, trainer: Trainer, batch_idx: int) -> bool:
        """Return whether training has reached the switch; override to decide otherwise."""
        return self.switch_point.reached(trainer, batch_idx)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._state = None
            self._pass.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_on_error(self.on_error)
        check_with_swa(trainer, self)
        self.switch_point.check(trainer, type(self).__name__)
        layers = storing_layers(pl_module, self.layers)
        self._at_start = LayerSnapshot(layers)
        self._affine = affine_of(layers.values()) if self.affine else []
        for optimizer in trainer.optimizers if self.affine else ():
            check_lbfgs(optimizer, self._affine)
        if self.statistics == "precise":
            self._pass.check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.statistics == "precise":
            self._pass.check_loader(trainer)  # exists from here on
        if self._warmup_length(trainer) and not all(hasattr(o, "register_step_pre_hook") for o in trainer.optimizers):
            raise ValueError(
                "FreezeBNCallback: an optimizer has no step hooks, which the learning-rate warm-up needs: pass "
                "warmup_epochs=0."
            )
        self.freeze_again(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._state is not None:
            return
        if self.statistics == "precise":
            self._pass.on_train_batch(pl_module, batch)
        if self.should_freeze(trainer, batch_idx):
            with suppress(Exception):  # a batch that cannot be counted must not end the fit
                self._warn_of_large_batches(pl_module, as_batch_size_fn(self.precise.batch_size_fn)(batch))
            self._switch(trainer, pl_module)

    def freeze_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the layers that were frozen in the checkpoint, unless they are."""
        if self._state is not None and self._handle is None:
            self._freeze(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._handle is not None:
            drop_gradients(optimizer, self._affine)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        warm_up = self._warm_up
        if warm_up is not None and 0 < warm_up.done[0] <= warm_up.steps and logs_at_this_batch(trainer):
            log_row(trainer, {"freeze_bn/lr_factor": warm_up.done[0] / warm_up.steps})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._state is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"FreezeBNCallback never froze anything: the fit ended after epoch {trainer.current_epoch} and step "
                f"{trainer.global_step}, before {self.switch_point}."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._thaw()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._thaw()

    def state_dict(self) -> dict[str, Any]:
        if self._state is None:
            return {}
        done = list(self._warm_up.done) if self._warm_up else self._state["warmup_done"]
        return {**self._state, "warmup_done": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict) or None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_state": self.state_dict() or None, "_handle": None, "_warm_up": None, "_affine": []}

    def _switch(self, trainer: Trainer, module: LightningModule) -> None:
        untrained = with_initial_stats(storing_layers(module, self.layers))
        result: PassResult | None = None
        if self.statistics == "precise":
            kept = "the running statistics are frozen as they are"
            failures = Failures(type(self).__name__, "freeze_bn/failed", kept, self.on_error, succeeded=True)
            result = failures.attempt(trainer, lambda: self._recompute(trainer, module))
            self._pass.reset()
        if result:
            log_row(trainer, result.to_metrics("freeze_bn"))
            self._notify_population_pass(trainer, result)
        self._warn_of_untrained(trainer, untrained, result)
        self._state = {
            "step": trainer.global_step,
            "warmup_steps": self._warmup_length(trainer),
            "warmup_done": [0] * len(trainer.optimizers),
        }
        self._freeze(trainer, module)

    def _recompute(self, trainer: Trainer, module: LightningModule) -> PassResult | None:
        context = PassContext.of(trainer, module, self.layers)
        reason = self._pass.skip_reason() if context.layers else "all of its layers are frozen"
        if reason:
            rank_zero_warn(f"FreezeBNCallback freezes the running statistics as they are: {reason}.")
            return None
        return self._pass.run(context)

    def _freeze(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._state is not None
        # affine: the handle serves optimizers that the user steps himself, on_before_optimizer_step gradient clipping
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
                "FreezeBNCallback: an epoch has no known length, so warmup_epochs cannot be counted in steps: pass "
                "warmup_steps."
            )
        steps_per_epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        return max(1, round(self.warmup_epochs * steps_per_epoch))

    def _warn_of_untrained(self, trainer: Trainer, untrained: dict[str, _BatchNorm], result: PassResult | None) -> None:
        reached = {*self._at_start.changed(untrained, STATISTICS_KEYS), *(result.statistics if result else ())}
        unknown = result is None and trainer.global_step == 0
        names = [name for name in untrained if name in reached or unknown]  # nothing calls the others
        if names:
            rank_zero_warn(
                "FreezeBNCallback freezes statistics that were never trained (mean 0 and variance 1 in "
                f"{len(names)} layers, {names[0]!r} first). A network does not train from the start with "
                "frozen statistics (Sec. 4.3): freeze later, or load trained weights."
            )

    def _warn_of_large_batches(self, module: LightningModule, samples: int) -> None:
        sizes = normalization_batch_size(module, samples=samples, layers=self.layers)
        harmful = [sizes[name] for name in storing_layers(module, self.layers) if sizes[name] >= _HARMFUL_SIZE]
        if harmful:
            rank_zero_warn(
                f"FreezeBNCallback freezes layers whose normalization batch holds {max(harmful):g} samples. In the "
                "paper FrozenBN helps up to 8 and costs accuracy from 16 on (Fig. 5 and 6)."
            )
