"""BatchLeakageMonitor: test whether normalization batches are random in their samples (paper, Sec. 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_bn import plots
from lightning_bn.callbacks.mini_batch_inference import MiniBatchInferenceCallback
from lightning_bn.callbacks.monitor_output import MAX_LAYERS_WITH_KEYS
from lightning_bn.callbacks.observing import ObservingCallback
from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.checks import check_bool
from lightning_bn.functional.leakage import BatchLeakage, left_out_message
from lightning_bn.functional.leakage_test import EProcess
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.trainer.compat import log_step
from lightning_bn.trainer.forward import Forward
from lightning_bn.trainer.leakage_pass import LeakagePass, compare_statistics
from lightning_bn.trainer.logging import log_row, safe_keys

_ADVICE = {
    "GhostBNCallback": "GhostBNCallback across the pattern where it is wanted",
    "SyncBNCallback": "SyncBNCallback in a head of regions",
    "RoIShuffleCallback": "RoIShuffleCallback in a head of regions",
    "FreezeBNCallback": "FreezeBNCallback",
}
"""Callback -> advice in an alert, unless the callback is in use."""


class BatchLeakageMonitor(ObservingCallback):
    """Test whether normalization batches are random in their samples, and warn if not (Sec. 6).

    Random batches of each epoch run once more at its end, muted, in eval mode, and `batch_leakage` tests them. The
    p-values of all epochs form one. Without leakage, it falls to ``alpha`` in at most that fraction of runs.
    After an alarm the monitor stops testing. Training does not change. Errors within a fit become warnings.

    It helps if a sampler, a loss or a head on regions gives batches a pattern: the training loss does not reveal it.
    It does not help to measure the cost of leakage (use ``log_errors``), nor with patterns outside channel means.
    Cost: a copy of the kept batches, a forward over ``num_samples`` samples an epoch, and the test.

    Args:
        num_samples: Samples of an epoch to test, of all ranks together, in four batches or more.
        alpha: Fraction of runs without leakage that may alarm.
        forward: As in `PreciseBNCallback`: ``"training_step"``, ``"forward"``, or a function of module and batch.
        log_errors: Log the metrics of each validation with population statistics, with mini-batch statistics (shuffle
            the validation loader), and with those of ``same_pattern``. Each costs one more validation.
        same_pattern: Function from the Trainer to a loader of validation samples in training's pattern; ranks share it.
        layers: Glob patterns over qualified layer names; None for every layer that is not frozen.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors or the length of a list.
        max_bytes: Maximum size of the kept batches in main memory, on each rank.

    Attributes:
        result: Result of the last test, or None.
        p_value: p-value of the run so far; NaN before the first test.
        alarmed: True if it has fallen to ``alpha``; None before the first test.

    Raises:
        ValueError: At fit start: no layer to test, a module that cannot run batches without side effects, or
            ``log_errors`` with a `MiniBatchInferenceCallback`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import BatchLeakageMonitor
        >>> trainer = Trainer(callbacks=[BatchLeakageMonitor()], logger=False, enable_checkpointing=False)
    """

    kind = "leakage monitor"

    def __init__(
        self,
        num_samples: int = 4096,
        *,
        alpha: float = 0.01,
        forward: Forward = "training_step",
        log_errors: bool = False,
        same_pattern: Callable[[Trainer], Iterable[Any]] | None = None,
        layers: Layers = None,
        batch_size_fn: BatchSizeFn | None = None,
        max_bytes: int = 2**32,
    ) -> None:
        if not (isinstance(alpha, float) and 0 < alpha < 1):
            raise ValueError(f"alpha must be a fraction of runs between 0 and 1 but is {alpha!r}.")
        check_bool("log_errors", log_errors)
        as_patterns(layers)
        if same_pattern is not None and not callable(same_pattern):
            raise TypeError(f"same_pattern must be a function from the Trainer to a loader but is {same_pattern!r}.")
        if same_pattern is not None and not log_errors:
            raise ValueError("same_pattern is for log_errors=True, which logs its error.")
        self.alpha, self.log_errors, self.same_pattern, self.layers = alpha, log_errors, same_pattern, layers
        self.result: BatchLeakage | None = None
        self._pass = LeakagePass(num_samples, forward, layers, batch_size_fn, max_bytes)
        self._evidence = EProcess()

    @property
    def p_value(self) -> float:
        return self._evidence.p_value if self._evidence.epochs else torch.nan

    @property
    def alarmed(self) -> bool | None:
        return self.p_value <= self.alpha if self._evidence.epochs else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.result, self._evidence = None, EProcess()
            self._pass.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._pass.check(pl_module, trainer)
        others = [c for c in trainer.callbacks if isinstance(c, MiniBatchInferenceCallback)]  # type: ignore[attr-defined]
        if self.log_errors and any("validate" in c.stages for c in others):
            raise ValueError(
                "BatchLeakageMonitor(log_errors=True) compares population and mini-batch statistics in validation, but "
                "MiniBatchInferenceCallback leaves no population statistics there. Give it no stage 'validate'."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass.reset()  # batches of one epoch only: a sample may repeat in the next one

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.alarmed:
            self._pass.keep(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.log_errors and trainer.state.fn == "fit" and not trainer.sanity_checking:
            with self._errors_as_warnings("compares nothing in this validation"):
                errors = compare_statistics(trainer, pl_module, self.layers, self.same_pattern, "batch_leakage")
                log_row(trainer, errors)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.alarmed:
            with self._errors_as_warnings("tests nothing in this epoch"):
                self.result = result = self._pass.run(trainer, pl_module)
                self._evidence.add(result.p_value)
                self._report(trainer, pl_module, result)
        self._pass.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.result is not None and not self.alarmed:
            self._draw(trainer, self.result)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._pass.reset()

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._evidence)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._evidence = EProcess(**state_dict)

    def _report(self, trainer: Trainer, module: LightningModule, result: BatchLeakage) -> None:
        if result.left_out:
            self._warn_once(f"BatchLeakageMonitor: {left_out_message(result.left_out)}")
        keys = safe_keys(storing_layers(module, self.layers))
        row = {"p_value": self.p_value, "epoch_p_value": result.p_value, "icc_worst": result.icc[result.worst_layer]}
        if len(result.icc) <= MAX_LAYERS_WITH_KEYS:
            row |= {f"icc/{keys[name]}": value for name, value in result.icc.items()}
        with self._errors_as_warnings("could not log"):
            log_row(trainer, {f"batch_leakage/{key}": value for key, value in row.items()})
        if self.alarmed:
            with self._errors_as_warnings("could not send its alert"):
                self._alert(trainer, result)
            self._draw(trainer, result)

    def _alert(self, trainer: Trainer, result: BatchLeakage) -> None:
        worst = result.worst_layer
        alike = result.icc[worst] > 0
        advice = [text for name, text in _ADVICE.items() if not self._has_callback(trainer, name, worst)]
        plots.alert(
            trainer,
            title="Batches leak information" if alike else "Batches are balanced",
            text=f"In epoch {trainer.current_epoch} the samples that layer {worst!r} normalizes together are "
            f"{'more' if alike else 'less'} alike than random ones: intra-class correlation {result.icc[worst]:.2g} "
            f"(noise {result.noise[worst]:.1g}), p = {self.p_value:.1g} for the run. "
            + (f"{', or '.join(['Shuffle', *advice])}. " if alike else "")
            + ("" if self.log_errors else "log_errors=True measures the cost."),
        )

    def _draw(self, trainer: Trainer, result: BatchLeakage) -> None:
        if plots.any_logs(trainer):
            with self._errors_as_warnings("could not draw"):
                figure = plots.leakage_by_layer(result.icc, noise=result.noise, p_value=self.p_value)
                plots.log_figure(trainer, key="batch_leakage/layers", figure=figure, step=log_step(trainer))
