"""Additional passes over the evaluated dataloaders, to measure statistics or to evaluate under a behavior."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric

from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import NoStopIteration
from lightning_bn.functional.measure import MeasureConfig, measure
from lightning_bn.functional.precise import call_model
from lightning_bn.trainer.compat import (
    MetricsCollector,
    combination_mode,
    evaluation_loaders,
    evaluation_loop,
    hook_arguments,
    run_hook,
    step_arguments,
)
from lightning_bn.trainer.context import PassContext, batch_domain, set_modes
from lightning_bn.trainer.isolation import isolate
from lightning_bn.trainer.loaders import evaluation_batches
from lightning_bn.trainer.logging import progress_of
from lightning_bn.trainer.passes import PassResult, gaps_from_running_stats

TargetForward: TypeAlias = Literal["evaluation_step", "forward"] | Callable[[LightningModule, Any], Any]
"""The evaluation step, ``forward``, or a function of module and batch."""

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
    """Validate or test a second time, restore everything, and return the metrics, keyed ``prefix/key``.

    ``behavior``, such as a handle, is entered for it. The module's step and hooks run; the callbacks' hooks do not. Its
    torchmetrics start empty.
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
            output = _run_step(trainer, module, batch, batch_idx, dataloader_idx)
            run_hook(trainer, module, f"on_{stage}_batch_end", output, *arguments)
            collector.end_batch()
        collector.end_dataloader()
        collector.end_epoch()
        run_hook(trainer, module, f"on_{stage}_epoch_end")
        collector.end_dataloader()
        return {f"{prefix}/{key}": float(value) for key, value in collector.metrics.items()}


def measure_target(
    context: PassContext,
    dataloader_idx: int,
    num_samples: int | None,
    forward: TargetForward,
    batch_size_fn: BatchSizeFn | None,
) -> PassResult:
    """Measure the population statistics of one of the evaluated dataloaders; of all if they are combined."""
    trainer, module = context.trainer, context.module
    if forward == "evaluation_step":
        check_step_takes_batch(trainer, module, "forward='forward' or a function of module and batch")
    samples = as_batch_size_fn(batch_size_fn)

    def run(item: tuple[Any, int, int]) -> None:
        batch, _, loader = item
        begin()
        with fixed():
            if forward == "evaluation_step":
                _run_step(trainer, module, *item)
            else:
                with trainer.precision_plugin.forward_context(), batch_domain(trainer, batch, loader):
                    (forward if callable(forward) else call_model)(module, batch)

    assert trainer.state.stage is not None
    started = time.perf_counter()
    with (
        isolate(trainer, module, trainer.state.stage) as fixed,
        set_modes(dict.fromkeys(module.modules(), False), False, estimated=()) as begin,
        evaluation_batches(trainer, module, dataloader_idx) as batches,
        NoStopIteration("The forward over target batches"),
    ):
        config = MeasureConfig(num_samples, "loader", batch_size_fn=lambda item: samples(item[0]))
        progress = progress_of(trainer, "AdaBN")
        statistics = measure(context.layers, batches, run, config, of_training=False, progress=progress)
    moved = gaps_from_running_stats(context.layers, statistics)
    return PassResult(statistics, moved, time.perf_counter() - started)


def check_step_takes_batch(trainer: Trainer, module: LightningModule, alternative: str) -> None:
    """Raise ValueError for an evaluation step that fetches batches itself; the message names the ``alternative``."""
    step = f"{stage_of(trainer)}_step"
    if is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True):
        raise ValueError(
            f"{type(module).__name__}.{step} takes a dataloader_iter and fetches batches itself: pass {alternative}."
        )


def stage_of(trainer: Trainer) -> str:
    """Return ``"validation"``, ``"test"`` or ``"predict"``, as in the names of hooks."""
    if trainer.testing or trainer.predicting:
        return "test" if trainer.testing else "predict"
    if trainer.validating or trainer.sanity_checking:
        return "validation"
    raise RuntimeError(f"The Trainer does not evaluate now: it is in stage {trainer.state.stage}.")


def num_dataloaders(trainer: Trainer) -> int:
    """Count the evaluated dataloaders; combined ones count as one."""
    loaders = evaluation_loaders(trainer)
    return len(loaders.flattened) if combination_mode(loaders) == "sequential" else 1


def has_batches(trainer: Trainer, dataloader_idx: int) -> bool:
    """Return whether this rank may get batches from a dataloader; True for a stream of unknown length."""
    return bool(evaluation_loop(trainer).max_batches[dataloader_idx] > 0)


def _run_step(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
    stage = stage_of(trainer)
    arguments = step_arguments(trainer, f"{stage}_step", _hook_arguments(trainer, batch, batch_idx, dataloader_idx))
    with getattr(trainer.precision_plugin, _STEP_CONTEXTS[stage])(), batch_domain(trainer, batch, dataloader_idx):
        # on the module itself: DDP's wrapper would wait for other ranks
        return run_hook(trainer, module, f"{stage}_step", *arguments)


def _hook_arguments(trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int) -> dict[str, Any]:
    return hook_arguments(trainer, batch, batch_idx, dataloader_idx if num_dataloaders(trainer) > 1 else None)
