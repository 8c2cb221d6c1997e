"""BatchLeakageMonitor: whether the samples that share a normalization batch were put together at random (Sec. 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_bn import plots
from lightning_bn.callbacks.mini_batch_inference import MiniBatchInferenceCallback
from lightning_bn.callbacks.observing import ObservingCallback
from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.checks import check_bool
from lightning_bn.functional.leakage import BatchLeakage, said_of
from lightning_bn.functional.leakage_test import EProcess
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.trainer.compat import log_step
from lightning_bn.trainer.forward import Forward
from lightning_bn.trainer.leakage_pass import LeakagePass, compare_statistics
from lightning_bn.trainer.logging import log_row, safe_keys

_MAX_KEYED = 64
"""Layers that get keys of their own, as of `BNStatsMonitor`."""

_WAYS_OUT = {
    "GhostBNCallback": "GhostBNCallback across the pattern where it is wanted",
    "SyncBNCallback": "SyncBNCallback in a head of regions",
    "RoIShuffleCallback": "RoIShuffleCallback in a head of regions",
    "FreezeBNCallback": "FreezeBNCallback",
}
"""Callback -> what to do beside shuffling, unless the callback is there."""


class BatchLeakageMonitor(ObservingCallback):
    """Tell whether normalization batches are i.i.d. in what BatchNorm sees, and sound an alarm if not (Sec. 6).

    A model learns to read a pattern in its batches off their statistics, and is lost in evaluation: with batches of
    16 classes x 2 images validation error was 51.1 % with population and 23.3 % with mini-batch statistics (Fig. 8).
    Training shows nothing of it, and in train mode BatchNorm subtracts the evidence. So some batches of each epoch,
    chosen at random, are shown once more to the model as it is at the epoch's end, with population statistics and
    without leaving a trace; of each layer the intra-class correlation of its normalization batches (its own: `ghost_bn`
    and SyncBN count) is held against random regrouping, two-sided. See `batch_leakage`, which this is; the epochs'
    p-values make one of the run, which falls below ``level`` by chance in at most that share of runs, however
    many layers and epochs they have. An alarm is final: the monitor then rests.

    On alarm, if correlations are positive (samples that share a batch are alike):

    - Shuffle, if it was left out; sample the classes of a batch independently.
    - If the loss needs the pattern: `GhostBNCallback` with groups that cut across it. Interleaved groups separate
      neighbors, c0, c0, c1, c1, ...; contiguous ones keep pairs together and the leak with them.
    - In an R-CNN head on one image's regions, which are alike: `SyncBNCallback` on the head, or rows exchanged between
      ranks; box AP 30.7 became 41.7 (Table 3). `MiniBatchInferenceCallback` on the head: 41.5.
    - `FreezeBNCallback`: what normalizes with the population cannot leak.

    Negative correlations say that batches are balanced, by class for instance. That is not i.i.d. either; compare
    the errors (``log_errors=True``) before changing anything.

    Its unit is the sample: where a sample is several rows of a layer (tokens, views), they are averaged, and a layer of
    which it cannot be told whose rows are whose (nodes of graphs, regions of several images) is left out and named.
    Only where each normalization batch is the rows of a single sample are the rows compared; see `batch_leakage`.

    Whatever it meets in a fit (a step that raises, batches too large to keep) costs a test, is said once, and ends no
    training. Of an epoch in which a run is resumed it tests the batches that came after.

    When it does not help: it does not say what leakage costs. Ten digit classes as 8 x 2 alarm, and cost nothing
    (3.6 % error against 3.8). It cannot see patterns that do not show in a sample's channel means, regions of two
    images in a batch (which cost little: box AP 40.1 against 41.7), nor a single batch per epoch.

    Cost: a copy of the kept batches, a forward over ``num_samples`` samples an epoch, and the test
    (``python -m benchmarks --only leakage.cpu`` measures it); with ``compare``, two or three
    further validations each time.

    Args:
        num_samples: Samples of an epoch to test, of all ranks together, in four batches or more. 4096 find 16 classes
            x 2 of 80 classes at the first epoch's end; 2048 did not always.
        alpha: Share of runs without leakage that may alarm.
        forward: As `PreciseBNCallback`'s: ``"training_step"``, muted; ``"forward"``; or a function of module and batch.
        log_errors: Log in each validation of the fit what it logs with population statistics, with mini-batch statistics,
            and, where ``same_pattern`` is given, with those of batches in training's pattern: the curves of Fig. 8.
            Leakage makes the first rise while the last falls. The second needs a validation loader that is shuffled.
        same_pattern: From the Trainer to a loader of validation samples, put together as in training. Ranks share it.
        layers: Glob patterns over qualified layer names, such as ``"*roi_heads.*"``; None for every layer that is not
            frozen.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors and the length of lists of images.
            What is several rows of a layer goes by it.
        max_bytes: What the kept batches may take in main memory on each rank. 4096 images of 224 px in float32 are
            2.5e9, of all ranks together.

    Attributes:
        result: What the last test found, or None.
        p_value: Of the run so far; NaN before the first test.
        alarmed: Whether it fell below ``level``; None before the first test. With a strategy that starts processes of
            its own (``ddp_spawn``), the callback of the process that called ``fit`` has tested nothing.

    Raises:
        ValueError: At fit start, naming the way out: no layer to test, a module that cannot be shown batches neutrally,
            ``compare`` beside a `MiniBatchInferenceCallback`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import BatchLeakageMonitor
        >>> trainer = Trainer(callbacks=[BatchLeakageMonitor()], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.BatchLeakageMonitor
              init_args: {layers: "*roi_heads.*", count: builtins.len}
        ```
    """

    kind = "leakage monitor"

    def __init__(
        self,
        num_samples: int = 4096,
        alpha: float = 0.01,
        forward: Forward = "training_step",
        log_errors: bool = False,
        same_pattern: Callable[[Trainer], Iterable[Any]] | None = None,
        layers: Layers = None,
        batch_size_fn: BatchSizeFn | None = None,
        max_bytes: int = 2**32,
    ) -> None:
        if not (isinstance(alpha, float) and 0 < alpha < 1):
            raise ValueError(f"alpha must be a share of runs between 0 and 1 but is {alpha!r}.")
        check_bool("log_errors", log_errors)
        as_patterns(layers)
        if same_pattern is not None and not callable(same_pattern):
            raise TypeError(f"same_pattern must be a function from the Trainer to a loader but is {same_pattern!r}.")
        if same_pattern is not None and not log_errors:
            raise ValueError("same_pattern is for log_errors=True, whose third error it gives.")
        self.alpha = alpha
        self.log_errors = log_errors
        self.same_pattern = same_pattern
        self.layers = layers
        self.result: BatchLeakage | None = None
        self._pass = LeakagePass(num_samples, forward, layers, batch_size_fn, max_bytes)
        self._evidence = EProcess()

    @property
    def p_value(self) -> float:
        """Of the run so far; NaN before the first test."""
        return self._evidence.p_value if self._evidence.epochs else torch.nan

    @property
    def alarmed(self) -> bool | None:
        """Whether the run's p-value is at most ``level``; None before the first test."""
        return self.p_value <= self.alpha if self._evidence.epochs else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state; a checkpoint is restored after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.result, self._evidence = None, EProcess()
            self._pass.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the configuration before training starts."""
        super().on_fit_start(trainer, pl_module)
        self._pass.check(pl_module, trainer)
        others = [c for c in trainer.callbacks if isinstance(c, MiniBatchInferenceCallback)]  # type: ignore[attr-defined]
        if self.log_errors and any("validate" in c.stages for c in others):
            raise ValueError(
                "BatchLeakageMonitor(log_errors=True) evaluates with population and with mini-batch statistics, and "
                "MiniBatchInferenceCallback leaves no population: give that one other stages than 'validate'."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the batches of one epoch alone: a sample may come again in the next, but never twice in a batch."""
        self._pass.reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Perhaps keep the batch."""
        if not self.alarmed:
            self._pass.keep(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the errors of Fig. 8, if asked for."""
        if self.log_errors and trainer.state.fn == "fit" and not trainer.sanity_checking:
            with self._spared("compares nothing in this validation"):
                log_row(
                    trainer, compare_statistics(trainer, pl_module, self.layers, self.same_pattern, "batch_leakage")
                )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the epoch's batches; log, and sound the alarm."""
        if not self.alarmed:
            with self._spared("tests nothing in this epoch"):
                self.result = found = self._pass.run(trainer, pl_module)
                self._evidence.add(found.p_value)
                self._report(trainer, pl_module, found)
        self._pass.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last epoch tested."""
        if self.result is not None and not self.alarmed:
            self._draw(trainer, self.result)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the batches of an epoch that was broken off."""
        self._pass.reset()

    def state_dict(self) -> dict[str, Any]:
        """The evidence so far."""
        return asdict(self._evidence)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the callback state."""
        self._evidence = EProcess(**state_dict)

    def _report(self, trainer: Trainer, module: LightningModule, found: BatchLeakage) -> None:
        if found.left_out:
            self._say(f"BatchLeakageMonitor: {said_of(found.left_out)}")
        keys = safe_keys(storing_layers(module, self.layers))
        worst = found.worst_layer
        row = {"p_value": self.p_value, "epoch_p_value": found.p_value, "icc_worst": found.icc[worst]}
        if len(found.icc) <= _MAX_KEYED:
            row |= {f"icc/{keys[name]}": value for name, value in found.icc.items()}
        with self._spared("could not log"):
            log_row(trainer, {f"batch_leakage/{key}": value for key, value in row.items()})
        if self.alarmed:
            self._alert(trainer, found)
            self._draw(trainer, found)

    def _alert(self, trainer: Trainer, found: BatchLeakage) -> None:
        worst = found.worst_layer
        alike = found.icc[worst] > 0
        ways_out = [what for name, what in _WAYS_OUT.items() if name not in self._present(trainer, worst)]
        with self._spared("could not send its alert"):
            plots.alert(
                trainer,
                "Batches leak information" if alike else "Batches are balanced",
                f"In epoch {trainer.current_epoch} the samples that layer {worst!r} normalizes together are "
                f"{'more' if alike else 'less'} alike than random ones: intra-class correlation {found.icc[worst]:.2g} "
                f"(noise {found.noise[worst]:.1g}), p = {self.p_value:.1g} for the run. "
                + (f"{', or '.join(['Shuffle', *ways_out])}. " if alike else "")
                + ("" if self.log_errors else "log_errors=True shows what it costs."),
            )

    def _draw(self, trainer: Trainer, found: BatchLeakage) -> None:
        if plots.any_logs(trainer):
            with self._spared("could not draw"):
                figure = plots.leakage_by_layer(found.icc, found.noise, p_value=self.p_value)
                plots.log_figure(trainer, "batch_leakage/layers", figure, log_step(trainer))
