"""Evaluation under a behavior: what the module would log if its layers did something else, and no trace of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from lightning_bn.trainer.evaluation_loop import hook_arguments, num_domains, run_hook, run_step, stage_of
from lightning_bn.trainer.isolation import isolate


def evaluate_isolated(
    behavior: AbstractContextManager[Any],
    trainer: Trainer,
    module: LightningModule,
    batches: Iterable[tuple[Any, int, int]],
    prefix: str,
) -> dict[str, float]:
    """Run a validation or test of its own within the one that runs now, and return what it would have logged.

    The module's step and its own hooks of the stage run (epoch start and end, batch start and end), callbacks' do not.
    Its torchmetrics start empty. What `self.log` is given is averaged, reduced and named as Lightning does; loggers,
    progress bars and the metrics of the evaluation around see nothing of it. The module, its metrics and random
    numbers are as before, see `isolate`.

    Args:
        behavior: Entered for the time, a handle for instance; ``contextlib.nullcontext()`` for the model as it is.
        trainer: The Trainer, while it validates or tests.
        module: Its module.
        batches: Each batch with its index and that of its dataloader, as from `evaluation_batches`.
        prefix: In front of each key: ``prefix/key``.

    Returns:
        Prefixed key -> value, at the end of the epoch.

    Raises:
        RuntimeError: If the Trainer neither validates nor tests, or if a step raises StopIteration.
    """
    stage = stage_of(trainer)
    if stage == "predict":
        raise RuntimeError("trainer.predict logs nothing, so there are no metrics to compare.")
    assert trainer.state.stage is not None
    connector = trainer._logger_connector
    found: dict[str, Any] = {}
    with behavior, isolate(trainer, module, trainer.state.stage, may_log=True), _own_results(trainer):
        for metric in (m for m in module.modules() if isinstance(m, Metric)):
            metric.reset()  # from the middle of the evaluation around
        try:
            run_hook(trainer, module, f"on_{stage}_epoch_start")
            current = 0
            for batch, batch_idx, dataloader_idx in batches:
                if dataloader_idx != current:
                    found |= _of_epoch(trainer)
                    current = dataloader_idx
                arguments = hook_arguments(trainer, batch, batch_idx, dataloader_idx).values()
                connector.on_batch_start(batch, dataloader_idx if num_domains(trainer) > 1 else None)
                run_hook(trainer, module, f"on_{stage}_batch_start", *arguments)
                output = run_step(trainer, module, batch, batch_idx, dataloader_idx)
                run_hook(trainer, module, f"on_{stage}_batch_end", output, *arguments)
                connector.on_batch_end()
            found |= _of_epoch(trainer)
            connector._evaluation_epoch_end()
            run_hook(trainer, module, f"on_{stage}_epoch_end")
            found |= _of_epoch(trainer)
        except StopIteration as error:  # would end Lightning's evaluation without a word
            raise RuntimeError(f"{type(module).__name__}.{stage}_step raised StopIteration.") from error
        return {f"{prefix}/{key}": float(value) for key, value in found.items()}


def _of_epoch(trainer: Trainer) -> dict[str, Any]:
    """What loggers would have got of the epoch, of the current dataloader."""
    trainer._logger_connector.epoch_end_reached()
    return dict(trainer._logger_connector.metrics["log"])


@contextmanager
def _own_results(trainer: Trainer) -> Iterator[None]:
    """A place of its own for what `self.log` is given, and everything that the Trainer notes of it given back.

    Lightning's own class does the averaging (private, 2.5 to 2.6), of whichever package the loop is.
    """
    loop: Any = trainer._active_loop
    connector = trainer._logger_connector
    results, noted = loop._results, vars(connector).copy()
    try:
        loop._results = type(results)(training=False)
        for name in ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics"):
            setattr(connector, name, {})
        connector._first_loop_iter = connector._current_fx = None
        yield
    finally:
        loop._results = results
        vars(connector).update(noted)
