"""AdaBN: evaluation uses the population statistics of the domain that is evaluated (paper, Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bn.callbacks.base import BatchNormCallback, as_stages
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.core.population import PopulationStatistics
from lightning_bn.core.ranks import sum_over_ranks
from lightning_bn.functional.adapt import Adaptation, Adapting
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, as_patterns, find_bn, storing_layers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.evaluation import (
    TargetForward,
    check_step_takes_batch,
    evaluate_isolated,
    has_batches,
    measure_target,
    num_dataloaders,
    stage_of,
)
from lightning_bn.trainer.loaders import evaluation_batches
from lightning_bn.trainer.logging import log_row
from lightning_bn.trainer.passes import check_sharding


class AdaBNCallback(BatchNormCallback):
    """Evaluate with population statistics of the evaluated data, outside of a fit (Sec. 5.1). See `adapt_bn`.

    Each dataloader is a domain. Its statistics are measured before its first batch, without labels. The original ones
    are restored bit for bit after the epoch.

    It helps if the inputs have shifted since training and the classes have not.
    It does not help without a shift, with other class frequencies, or after training with frozen statistics.
    Cost: one forward over ``num_samples`` samples of each dataloader.

    Args:
        num_samples: Samples from the start of each dataloader, of all ranks together. None takes all, which a loader
            sorted by class needs.
        prior_samples: Target samples that the original statistics count as, for few samples and a small shift.
        online: Normalize each batch with the statistics of all batches of this rank so far, without reading ahead.
            Predictions then depend on the order of batches.
        stages: Some of ``"validate"``, ``"test"`` and ``"predict"``, outside of a fit.
        log_unadapted: First evaluate without adapting, and log that as ``unadapted/<key>``. Not for ``"predict"``.
        forward: ``"evaluation_step"``, muted; ``"forward"``, the module called on the batch; or a function of both.
        layers: Glob patterns over qualified layer names; None for every layer that is not frozen.
        batch_size_fn: Number of samples in a batch; None infers it.

    Attributes:
        results: Statistics of each dataloader in the last evaluation; None for one without batches.
        source_metrics: Metrics without adaptation by logged key; empty without ``log_unadapted``.

    Raises:
        ValueError: At the start: no layer, a conflicting callback, or a loader that cannot be read twice.
        RuntimeError: At the start, for a strategy that shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import AdaBNCallback
        >>> trainer = Trainer(callbacks=[AdaBNCallback(log_unadapted=True)], logger=False, enable_checkpointing=False)
    """

    kind = "adapted"

    def __init__(
        self,
        num_samples: int | None = 1000,
        *,
        prior_samples: int = 0,
        online: bool = False,
        stages: Sequence[Literal["validate", "test", "predict"]] = ("validate", "test", "predict"),
        log_unadapted: bool = False,
        forward: TargetForward = "evaluation_step",
        layers: Layers = None,
        batch_size_fn: BatchSizeFn | None = None,
    ) -> None:
        if num_samples is not None:
            check_int("num_samples", num_samples, at_least=1)
        check_int("prior_samples", prior_samples, at_least=0)
        check_bool("online", online)
        check_bool("log_unadapted", log_unadapted)
        as_patterns(layers)
        if not callable(forward) and forward not in ("evaluation_step", "forward"):
            raise ValueError(f"forward must be 'evaluation_step', 'forward' or a function but is {forward!r}.")
        self.num_samples = num_samples
        self.prior_samples = prior_samples
        self.online = online
        self.stages = as_stages("stages", stages)
        self.log_unadapted = log_unadapted
        self.forward = forward
        self.layers = layers
        self.results: list[PopulationStatistics | None] = []
        self.source_metrics: dict[str, float] = {}
        self._batch_size_fn = as_batch_size_fn(batch_size_fn)
        self._context: PassContext | None = None
        self._is_measured = False
        self._dataloader_idx: int | None = None
        self._handle: Handle | None = None
        self._adapting: Adapting | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":  # a pass of PreciseBNCallback writes the source's statistics first
            self._move_behind_statistics_callbacks(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        storing_layers(pl_module, self.layers)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn not in self.stages:  # nor is "fit"
            return
        self._check_overlap(trainer, pl_module)
        check_sharding(trainer)
        self._check_is_first_to_adapt(trainer)
        context = PassContext.of(trainer, pl_module, self.layers)
        check_conflicts(context.layers, "adapted")
        self._warn_of_frozen(context)
        self.results, self.source_metrics = [], {}
        self._context = context if context.layers else None
        self._is_measured = False

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._context is None:
            return
        self._measure_once(self._context)
        if dataloader_idx != self._dataloader_idx:
            self._adapt_to(self._context, dataloader_idx)
        if self._adapting is not None:
            self._adapting.samples += self._batch_size_fn(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._context is not None:
            self._measure_once(self._context)  # a rank without batches takes part in the collectives here
        self._undo()

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_start = on_predict_batch_start = on_test_batch_start
    on_validation_epoch_end = on_predict_epoch_end = on_test_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_context": None, "_dataloader_idx": None, "_handle": None, "_adapting": None}

    def _measure_once(self, context: PassContext) -> None:
        if self._is_measured:
            return
        self._is_measured = True
        trainer, module = context.trainer, context.module
        if self.log_unadapted and stage_of(trainer) != "predict":
            check_step_takes_batch(trainer, module, "log_unadapted=False")
            with evaluation_batches(trainer, module) as batches:
                self.source_metrics = evaluate_isolated(nullcontext(), trainer, module, batches, "unadapted")
            log_row(trainer, self.source_metrics)
        if self.online:
            return
        # All dataloaders now, because ranks reach the first batch of a dataloader at different times.
        count = num_dataloaders(trainer)
        for index in range(count):
            ranks_with_batches, *_ = sum_over_ranks([has_batches(trainer, index)], context.device)
            if not ranks_with_batches:
                self.results.append(None)
                continue
            result = measure_target(context, index, self.num_samples, self.forward, self._batch_size_fn)
            self.results.append(result.statistics)
            log_row(trainer, result.to_metrics(f"ada_bn/dataloader_idx_{index}" if count > 1 else "ada_bn"))

    def _adapt_to(self, context: PassContext, dataloader_idx: int) -> None:
        self._restore()
        self._dataloader_idx = dataloader_idx
        if self.online:
            self._adapting = Adapting(context.layers, self.prior_samples)
            self._handle = Handle(context.layers.values(), self._adapting)
        else:
            statistics = self.results[dataloader_idx]
            assert statistics is not None  # because there is a batch
            self._handle = Adaptation(context.layers, statistics, self.prior_samples)

    def _restore(self) -> None:
        if self._handle is not None:
            self._handle.undo()
        if self._adapting is not None and self._adapting.nonfinite:
            rank_zero_warn(
                f"AdaBNCallback: {self._adapting.nonfinite} calls of layers got NaN or infinite values, and were "
                "left out of the target's statistics. Check its samples."
            )
        self._handle = self._adapting = self._dataloader_idx = None

    def _undo(self) -> None:
        self._restore()
        self._context = None

    def _check_is_first_to_adapt(self, trainer: Trainer) -> None:
        first = next(c for c in trainer.callbacks if isinstance(c, AdaBNCallback))  # type: ignore[attr-defined]
        if self.log_unadapted and first is not self:
            raise ValueError(
                "log_unadapted=True is only for the first AdaBNCallback in the list, whose layers are adapted before "
                "another one evaluates without adapting."
            )

    def _warn_of_frozen(self, context: PassContext) -> None:
        frozen = [name for name in storing_layers(context.module, self.layers) if name not in context.layers]
        if frozen:
            number = f"{len(frozen)} layers are frozen" if context.layers else "all of its layers are frozen"
            rank_zero_warn(
                f"AdaBNCallback leaves running statistics as they are: {number} or in eval mode ({frozen[0]!r} first), "
                "and weights trained with frozen statistics fit only those. If they are not, call train() on the "
                "module before."
            )
        for other in context.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, BatchNormCallback) and other.kind == "frozen":
                shared = [name for name in find_bn(context.module, other.layers) if name in context.layers]
                if shared:
                    rank_zero_warn(
                        f"AdaBNCallback re-estimates the statistics of layers that FreezeBNCallback freezes in "
                        f"training ({shared[0]!r} first). The weights fit the frozen ones: in our trial accuracy fell "
                        "from 77.9 to 48.5 %. Leave them out by layers=, or compare with log_unadapted=True."
                    )
