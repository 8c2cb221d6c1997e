"""Evaluation under a behavior: what the module would log if its layers did something else, without a trace of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from lightning_bn.core.checks import NoStopIteration
from lightning_bn.trainer.compat import (
    MetricsCollector,
    combination_mode,
    evaluation_loaders,
    evaluation_loop,
    hook_arguments,
    run_hook,
    step_arguments,
)
from lightning_bn.trainer.context import batch_domain
from lightning_bn.trainer.isolation import isolate

_STEP_CONTEXTS = {
    "validation": "val_step_context",
    "test": "test_step_context",
    "predict": "predict_step_context",
}


def evaluate_isolated(
    behavior: AbstractContextManager[Any],
    trainer: Trainer,
    module: LightningModule,
    batches: Iterable[tuple[Any, int, int]],
    prefix: str,
) -> dict[str, float]:
    """Run a second validation or test within the one that runs now, and return the metrics that it logs.

    The module's step and its hooks of the epoch and of batches run; the callbacks' hooks do not. Its torchmetrics start
    empty. Everything is restored afterwards, see `isolate`.

    Args:
        behavior: Entered meanwhile, such as a handle.
        trainer: The Trainer, while it validates or tests.
        module: Its module.
        batches: From `evaluation_batches`.
        prefix: In front of each key: ``prefix/key``.
    """
    stage = stage_of(trainer)
    if stage == "predict":
        raise RuntimeError("trainer.predict logs nothing, so there are no metrics to compare.")
    assert trainer.state.stage is not None
    with (
        behavior,
        isolate(trainer, module, trainer.state.stage, may_log=True),
        MetricsCollector(trainer) as collector,
        NoStopIteration(f"{type(module).__name__}.{stage}_step"),
    ):
        for metric in (m for m in module.modules() if isinstance(m, Metric)):
            metric.reset()  # it holds the batches of the outer evaluation
        run_hook(trainer, module, f"on_{stage}_epoch_start")
        current = 0
        for batch, batch_idx, dataloader_idx in batches:
            if dataloader_idx != current:
                collector.end_dataloader()
                current = dataloader_idx
            arguments = _hook_arguments(trainer, batch, batch_idx, dataloader_idx).values()
            collector.start_batch(batch, dataloader_idx if num_dataloaders(trainer) > 1 else None)
            run_hook(trainer, module, f"on_{stage}_batch_start", *arguments)
            output = run_step(trainer, module, batch, batch_idx, dataloader_idx)
            run_hook(trainer, module, f"on_{stage}_batch_end", output, *arguments)
            collector.end_batch()
        collector.end_dataloader()
        collector.end_epoch()
        run_hook(trainer, module, f"on_{stage}_epoch_end")
        collector.end_dataloader()
        return {f"{prefix}/{key}": float(value) for key, value in collector.metrics.items()}


def stage_of(trainer: Trainer) -> str:
    """``"validation"``, ``"test"`` or ``"predict"``, as in the names of hooks."""
    if trainer.testing or trainer.predicting:
        return "test" if trainer.testing else "predict"
    if trainer.validating or trainer.sanity_checking:
        return "validation"
    raise RuntimeError(f"The Trainer does not evaluate now: it is in stage {trainer.state.stage}.")


def num_dataloaders(trainer: Trainer) -> int:
    """The number of evaluated dataloaders that are read one after the other; combined ones count as one."""
    loaders = evaluation_loaders(trainer)
    return len(loaders.flattened) if combination_mode(loaders) == "sequential" else 1


def has_batches(trainer: Trainer, dataloader_idx: int) -> bool:
    """Whether this rank may get batches from a dataloader; True for a stream of unknown length."""
    return bool(evaluation_loop(trainer).max_batches[dataloader_idx] > 0)


def run_step(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
    """Run the module's evaluation step as the loop does."""
    stage = stage_of(trainer)
    arguments = step_arguments(trainer, f"{stage}_step", _hook_arguments(trainer, batch, batch_idx, dataloader_idx))
    with getattr(trainer.precision_plugin, _STEP_CONTEXTS[stage])(), batch_domain(trainer, batch, dataloader_idx):
        # on the module itself: DDP's wrapper would wait for other ranks
        return run_hook(trainer, module, f"{stage}_step", *arguments)


def _hook_arguments(trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int) -> dict[str, Any]:
    return hook_arguments(trainer, batch, batch_idx, dataloader_idx if num_dataloaders(trainer) > 1 else None)
