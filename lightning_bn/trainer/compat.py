"""Access to private names of Lightning 2.5 to 2.6, all of it in this file.

The comments explain why no public name does. `pytorch_lightning` has the same names.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from typing_extensions import Self


def train_loaders(trainer: Trainer) -> CombinedLoader | None:
    """Return the train dataloaders of the fit; None before they exist."""
    # trainer.train_dataloader has the loaders without the mode of their combination.
    return trainer.fit_loop._combined_loader


def evaluation_loop(trainer: Trainer) -> Any:
    """Return the loop that validates, tests or predicts now, also within a fit."""
    # The public loops are one for each stage; which one is active is not public.
    return trainer._active_loop


def evaluation_loaders(trainer: Trainer) -> CombinedLoader:
    """Return the dataloaders that are evaluated now."""
    # trainer.val_dataloaders and its like do not know the mode of combination.
    loaders: CombinedLoader = evaluation_loop(trainer)._combined_loader
    return loaders


def combination_mode(loaders: CombinedLoader) -> Any:
    """Return how loaders are combined: ``"sequential"``, ``"max_size_cycle"`` and so on."""
    # CombinedLoader takes the mode and has no public attribute for it.
    return loaders._mode


def unwrap_batch_sampler(loader: Any) -> tuple[Any, Any]:
    """Return a loader's batch sampler, and the wrapper by which `trainer.predict` records indices, or None."""
    # The wrapper is an iterator over itself. A second iteration changes nothing but its attributes.
    sampler: Any = getattr(loader, "batch_sampler", None)
    wrapped = type(sampler).__name__ == "_IndexBatchSamplerWrapper"
    return (sampler._batch_sampler, sampler) if wrapped else (sampler, None)


def batch_to_device(trainer: Trainer, module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Convert and transfer a batch as Lightning's loops do."""
    batch = trainer.precision_plugin.convert_input(batch)
    # The public hook on_before_batch_transfer skips the data module's override.
    batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def recorded_modes(trainer: Trainer) -> dict[str, bool] | None:
    """Return, by module name, the train modes before the evaluation that runs now; None while none runs."""
    in_fit = trainer.state.fn == "fit"
    loop: Any = trainer.fit_loop.epoch_loop.val_loop if in_fit else evaluation_loop(trainer)
    if loop is None or (in_fit and not trainer.validating):
        return None
    # Lightning puts every module in eval mode, and records the former modes for itself alone.
    modes: dict[str, bool] = loop._module_mode.mode
    return modes


def log_step(trainer: Trainer) -> int:
    """Return the step at which `self.log` logs now."""
    # trainer.global_step is one ahead at a batch's end, and counts each optimizer. Between batches, as at an epoch's
    # end, the counter is one ahead as well, and Lightning logs at the step before.
    epoch_loop = trainer.fit_loop.epoch_loop
    step, progress = epoch_loop._batches_that_stepped, epoch_loop.batch_progress
    between_batches = progress.current.completed == progress.current.ready
    return max(step - 1, 0) if trainer.training and between_batches else step


def logs_at_this_batch(trainer: Trainer) -> bool:
    """Return whether `self.log` reaches the loggers at this batch's end."""
    # Lightning has no public name for either condition.
    if not trainer._logger_connector.should_update_logs:
        return False
    return not (trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate())


def validation_was_skipped(trainer: Trainer) -> bool:
    """Return whether a resumed training skips a validation or an epoch's end that was due at its checkpoint."""
    # ModelCheckpoint(every_n_train_steps=) saves before the validation that the same batch triggers. A resumed fit
    # continues with the next batch. Nothing public indicates it.
    loop: Any = trainer.fit_loop.epoch_loop
    if not getattr(loop, "restarted_on_train_batch_end", False):
        return False
    return bool(loop.batch_progress.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def run_hook(trainer: Trainer, module: LightningModule, name: str, *args: Any) -> Any:
    """Call a hook or step of the module as the loop does."""
    # `self.log` refuses to run in a hook that was called directly.
    return call._call_lightning_module_hook(trainer, name, *args, pl_module=module)


def hook_arguments(trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int | None) -> dict[str, Any]:
    """Return the arguments that the evaluation loop passes to the hooks of a batch, by name."""
    # The loop decides which of them there are.
    return dict(evaluation_loop(trainer)._build_kwargs(batch, batch_idx, dataloader_idx))


def step_arguments(trainer: Trainer, step: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of the module's ``step``, from those of its hooks."""
    # The step may take fewer than its hooks.
    return tuple(evaluation_loop(trainer)._build_step_args_from_hook_kwargs(arguments, step))


class MetricsCollector:
    """Collect the values of `self.log` in ``metrics``, averaged, reduced and named as by Lightning.

    The results of the evaluation that runs, loggers and progress bars get none of it.
    """

    # `self.log` writes to the loop's results, and Lightning has no public way to change that.

    def __init__(self, trainer: Trainer) -> None:
        self.metrics: dict[str, Any] = {}
        self._loop: Any = evaluation_loop(trainer)
        self._connector = trainer._logger_connector

    def __enter__(self) -> Self:
        self._outer = self._loop._results, vars(self._connector).copy()
        self._loop._results = type(self._loop._results)(training=False)
        for name in ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics"):
            setattr(self._connector, name, {})
        self._connector._first_loop_iter = self._connector._current_fx = None
        return self

    def __exit__(self, *_: object) -> None:
        self._loop._results, connector = self._outer
        vars(self._connector).update(connector)

    def start_batch(self, batch: Any, dataloader_idx: int | None) -> None:
        self._connector.on_batch_start(batch, dataloader_idx)

    def end_batch(self) -> None:
        self._connector.on_batch_end()

    def end_dataloader(self) -> None:
        """End a dataloader, or the hooks of the epoch's end."""
        self._connector.epoch_end_reached()
        self.metrics |= self._connector.metrics["log"]

    def end_epoch(self) -> None:
        """End the epoch, before the hooks of its end."""
        self._connector._evaluation_epoch_end()


def state_key(callback: Callback, **differences: Any) -> str:
    """Return a key of a callback's state in checkpoints, which depends on its differences from others of its class."""
    # Lightning's docs tell authors of callbacks to call this private method.
    return callback._generate_state_key(**differences)


def weight_averagers(trainer: Trainer) -> list[Any]:
    """Return the Trainer's WeightAveraging callbacks, recognized by their methods."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if hasattr(c, "_swap_models") and hasattr(c, "_average_model")]


def averaged_model(averager: Any) -> Any:
    """Return the AveragedModel of a WeightAveraging callback; None before the fit."""
    # There is no public name for the averaged model, nor for the swap below.
    return averager._average_model


def swap_averaged_model(averager: Any, module: nn.Module) -> None:
    """Exchange the values of the module's parameters and buffers with the averaged ones."""
    averager._swap_models(module)


def add_rich_task(bar: Any, total: int, description: str) -> Any:
    """Add a line to a RichProgressBar, and return its id."""
    # The public `bar.progress.add_task` does not color the description with the bar's theme.
    return bar._add_task(total, description)
