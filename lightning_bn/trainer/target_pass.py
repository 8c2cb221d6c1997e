"""The target pass: show batches of the dataloader that is evaluated to the model, neutrally, and measure what they are.

What `PopulationPass` is for training batches. It writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import NoStopIteration
from lightning_bn.functional.measure import measure
from lightning_bn.functional.precise import call_model
from lightning_bn.trainer.context import batch_domain, set_modes
from lightning_bn.trainer.evaluation import run_step, stage_of
from lightning_bn.trainer.isolation import isolate
from lightning_bn.trainer.loaders import evaluation_batches
from lightning_bn.trainer.logging import progress_of
from lightning_bn.trainer.passes import PassResult, gaps_from_running_stats

TargetForward: TypeAlias = Literal["evaluation_step", "forward"] | Callable[[LightningModule, Any], Any]
"""How a batch reaches the model: the muted step of the evaluation, ``forward``, or a function of module and batch."""


def measure_target(
    trainer: Trainer,
    module: LightningModule,
    layers: dict[str, _BatchNorm],
    dataloader_idx: int,
    num_samples: int | None,
    forward: TargetForward,
    batch_size_fn: BatchSizeFn | None,
) -> PassResult:
    """Measure the population statistics of one of the dataloaders that are evaluated now.

    Args:
        trainer: The Trainer, while it validates, tests or predicts.
        module: Its module.
        layers: Qualified name -> layer to measure.
        dataloader_idx: Which one; all of them together where they are read side by side.
        num_samples: Samples to show, of all ranks together, in whole batches; None for the whole loader.
        forward: How a batch reaches the model.
        batch_size_fn: Samples in a batch.

    Raises:
        ValueError: If no batch came, all gave non-finite values, or the loader cannot be read twice.
        RuntimeError: If the forward raises StopIteration.
    """
    if forward == "evaluation_step":
        check_own_fetching(trainer, module, "forward='forward' or a function of module and batch")

    def run(item: tuple[Any, int, int]) -> None:
        begin()
        with fixed():
            show(item)

    def show(item: tuple[Any, int, int]) -> None:
        if forward == "evaluation_step":
            run_step(trainer, module, *item)
        else:
            with trainer.precision_plugin.forward_context(), batch_domain(trainer, item[0], item[2]):
                (forward if callable(forward) else call_model)(module, item[0])

    assert trainer.state.stage is not None
    started = time.perf_counter()
    with (
        isolate(trainer, module, trainer.state.stage) as fixed,
        set_modes(dict.fromkeys(module.modules(), False), False, estimated=()) as begin,
        evaluation_batches(trainer, module, dataloader_idx) as batches,
        NoStopIteration("The forward over target batches"),
    ):
        statistics = measure(
            layers,
            batches,
            run,
            of_training=False,
            num_samples=num_samples,
            batch_size_fn=lambda item: as_batch_size_fn(batch_size_fn)(item[0]),
            progress=progress_of(trainer, "AdaBN"),
        )
    moved = {name: gaps_from_running_stats(layers[name], measured) for name, measured in statistics.items()}
    return PassResult(statistics, moved, time.perf_counter() - started)


def check_own_fetching(trainer: Trainer, module: LightningModule, way_out: str) -> None:
    """Raise for an evaluation step that cannot be given a batch.

    Raises:
        ValueError: Naming the step and the ``way_out``.
    """
    step = f"{stage_of(trainer)}_step"
    if is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True):
        raise ValueError(
            f"{type(module).__name__}.{step} takes a dataloader_iter and fetches batches itself: pass {way_out}."
        )
