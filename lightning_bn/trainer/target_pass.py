"""The target pass: measures the population statistics of a dataloader that is evaluated. It writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import NoStopIteration
from lightning_bn.functional.measure import PassConfig, measure
from lightning_bn.functional.precise import call_model
from lightning_bn.trainer.context import PassContext, batch_domain, set_modes
from lightning_bn.trainer.evaluation import run_step, stage_of
from lightning_bn.trainer.isolation import isolate
from lightning_bn.trainer.loaders import evaluation_batches
from lightning_bn.trainer.logging import progress_of
from lightning_bn.trainer.passes import PassResult, gaps_from_running_stats

TargetForward: TypeAlias = Literal["evaluation_step", "forward"] | Callable[[LightningModule, Any], Any]
"""How a batch reaches the model: the muted step of the evaluation, ``forward``, or a function of module and batch."""


def measure_target(
    context: PassContext,
    dataloader_idx: int,
    num_samples: int | None,
    forward: TargetForward,
    batch_size_fn: BatchSizeFn | None,
) -> PassResult:
    """Measure the population statistics of one of the dataloaders that are evaluated now; of all if combined."""
    trainer, module = context.trainer, context.module
    if forward == "evaluation_step":
        check_step_takes_batch(trainer, module, "forward='forward' or a function of module and batch")
    samples = as_batch_size_fn(batch_size_fn)

    def run(item: tuple[Any, int, int]) -> None:
        batch, _, loader = item
        begin()
        with fixed():
            if forward == "evaluation_step":
                run_step(trainer, module, *item)
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
        config = PassConfig(num_samples, "loader", batch_size_fn=lambda item: samples(item[0]))
        progress = progress_of(trainer, "AdaBN")
        statistics = measure(context.layers, batches, run, config, of_training=False, progress=progress)
    moved = {name: gaps_from_running_stats(context.layers[name], new) for name, new in statistics.items()}
    return PassResult(statistics, moved, time.perf_counter() - started)


def check_step_takes_batch(trainer: Trainer, module: LightningModule, alternative: str) -> None:
    """Raise ValueError for an evaluation step that fetches its batches itself, naming the ``alternative``."""
    step = f"{stage_of(trainer)}_step"
    if is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True):
        raise ValueError(
            f"{type(module).__name__}.{step} takes a dataloader_iter and fetches batches itself: pass {alternative}."
        )
