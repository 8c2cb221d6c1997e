"""AdaBN: evaluation uses the population statistics of the domain it evaluates on (paper, Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.base import BatchNormCallback, as_stages
from lightning_bn.callbacks.freeze_bn import FreezeBNCallback
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.core.population import PopulationStatistics
from lightning_bn.core.ranks import sum_over_ranks
from lightning_bn.functional.adapt import Adaptation
from lightning_bn.functional.precise import estimable_layers
from lightning_bn.layers.adapted import Adapting
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, as_patterns, find_bn, storing_layers
from lightning_bn.trainer.evaluation import evaluate_isolated
from lightning_bn.trainer.evaluation_loop import has_batches, num_domains, stage_of
from lightning_bn.trainer.loaders import evaluation_batches
from lightning_bn.trainer.logging import log_row
from lightning_bn.trainer.modes import modes_of_training
from lightning_bn.trainer.passes import check_sharding
from lightning_bn.trainer.target_pass import TargetForward, check_own_fetching, measure_target


class AdaBNCallback(BatchNormCallback):
    """Re-estimate population statistics on the evaluated data before ``trainer.validate``, ``test`` or ``predict``.

    Each dataloader counts as a domain of its own: before its first batch the running statistics become those of its
    own samples, read without labels from a fresh iterator; at the epoch's end the original ones come back, bit for
    bit, as they do after an exception or Ctrl-C. Never inside a fit, whose validation is there to compare epochs, and
    whose checkpoints hold what it evaluated.

    When it helps: the inputs have shifted since training and the classes have not: error 40.8 -> 33.1 % at a contrast
    shift, 64.4 -> 52.5 with Gaussian noise, 40.4 -> 36.7 with JPEG, from 1000 images (Table 4). When it does not:
    without a shift (23.4 -> 23.8), with other class frequencies in the target, with few samples (see
    ``prior_samples``), and for a model trained with frozen statistics, which it destroys (accuracy 77.9 -> 48.5 % in a
    trial of ours); it warns of those that it can see. So compare: ``log_unadapted=True`` logs both.

    Cost: one forward over ``num_samples`` samples per dataloader; comparing, another evaluation. ``online`` costs
    one more read of each input.

    Args:
        num_samples: Samples of each dataloader, of all ranks together, in whole batches from its start; None for all,
            which a loader that is sorted by class needs. The paper's 1000.
        prior_samples: How many target samples the original statistics are worth, mixed in by ``N / (N + n)``, see
            `adapt_bn`. A prior protects where few samples come and the shift is small; at a strong one it is what
            is wrong (in a trial of ours 33.9 % error without, 89.5 with a prior of 16, from 64 samples).
        online: Instead of reading ahead, normalize each batch with the statistics of all batches so far, itself
            included, of this rank. Nothing is written. Predictions then depend on the order of batches.
        stages: Before which of ``"validate"``, ``"test"`` and ``"predict"``, outside of a fit.
        log_unadapted: First evaluate without adapting, and log that as ``unadapted/<key>``; not for ``"predict"``, which
            logs nothing.
        forward: ``"evaluation_step"``, muted; ``"forward"``, the module called on the batch (its first element if it
            is a tuple or list, or with it as keywords if it is a mapping); or a function of module and batch.
        layers: Glob patterns over qualified layer names; None for every layer that is not frozen.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors and the length of lists of images.

    Attributes:
        results: What was measured of each dataloader in the last evaluation; None for one without batches.
        unadapted: Metrics of the last evaluation without adaptation, by their logged keys; empty if none was asked for.

    Raises:
        ValueError: At the start: no layer, another AdaBNCallback or mini-batch inference on the same one; a loader that
            cannot be read twice.
        RuntimeError: If the strategy shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import AdaBNCallback
        >>> trainer = Trainer(callbacks=[AdaBNCallback(log_unadapted=True)], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.AdaBNCallback
              init_args: {num_samples: 1000, stages: [test], compare: true}
        ```
    """

    kind = "adapted"

    def __init__(
        self,
        num_samples: int | None = 1000,
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
        self.unadapted: dict[str, float] = {}
        self._count = as_batch_size_fn(batch_size_fn)
        self._due = False
        self._adapted: dict[str, _BatchNorm] = {}
        self._domain: int | None = None
        self._handle: Handle | None = None
        self._adapting: Adapting | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt after a PreciseBNCallback has recomputed the statistics of the source."""
        if stage != "fit":
            self._move_behind_statistics_callbacks(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the configuration before training starts."""
        super().on_fit_start(trainer, pl_module)
        storing_layers(pl_module, self.layers)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the target is about to come, if this is no fit."""
        self._due = trainer.state.fn in self.stages
        if self._due:
            self._begin(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adapt, before the first batch of a dataloader."""
        self._measure_target_if_pending(trainer, pl_module)
        if self._adapted:
            if dataloader_idx != self._domain:
                self._adapt_to(dataloader_idx)
            if self._adapting is not None:
                self._adapting.samples += self._count(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the original statistics back; a rank that had no batch takes part in the measurement of the others."""
        self._measure_target_if_pending(trainer, pl_module)
        self._undo()

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_start = on_predict_batch_start = on_test_batch_start
    on_validation_epoch_end = on_predict_epoch_end = on_test_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the original statistics."""
        self._undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The same, should another callback have raised in its own."""
        self._undo()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hold on layers."""
        return {**vars(self), "_due": False, "_adapted": {}, "_domain": None, "_handle": None, "_adapting": None}

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._check_overlap(trainer, module)
        check_sharding(trainer)
        self._check_late_comparison(trainer)
        self.results, self.unadapted = [], {}
        self._adapted = estimable_layers(module, self.layers, modes_of_training(trainer, module).__getitem__)
        check_conflicts(self._adapted, "adapted")
        self._warn_of_frozen(trainer, module)
        self._due = bool(self._adapted)

    def _measure_target_if_pending(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._due:
            return
        self._due = False
        if self.log_unadapted and stage_of(trainer) != "predict":
            check_own_fetching(trainer, module, "log_unadapted=False")
            with evaluation_batches(trainer, module) as batches:
                self.unadapted = evaluate_isolated(nullcontext(), trainer, module, batches, "unadapted")
            log_row(trainer, self.unadapted)
        if self.online:
            return
        several = num_domains(trainer) > 1
        for domain in range(num_domains(trainer)):  # all now: ranks come to a domain's first batch at different times
            somewhere, *_ = sum_over_ranks([has_batches(trainer, domain)], module.device)
            if not somewhere:
                self.results.append(None)
                continue
            measured = measure_target(
                trainer, module, self._adapted, domain, self.num_samples, self.forward, self._count
            )
            self.results.append(measured.statistics)
            log_row(trainer, measured.to_metrics(f"ada_bn/dataloader_idx_{domain}" if several else "ada_bn"))

    def _adapt_to(self, domain: int) -> None:
        self._put_back()
        self._domain = domain
        if self.online:
            self._adapting = Adapting(self._adapted, self.prior_samples)
            self._handle = Handle(self._adapted.values(), self._adapting)
        else:
            statistics = self.results[domain]
            assert statistics is not None  # there is a batch
            self._handle = Adaptation(self._adapted, statistics, self.prior_samples)

    def _put_back(self) -> None:
        if self._handle is not None:
            self._handle.undo()
        if self._adapting is not None and self._adapting.nonfinite:
            rank_zero_warn(
                f"AdaBNCallback: {self._adapting.nonfinite} calls of layers were given NaN or infinite values, and "
                "were left out of the target's statistics. Look at its samples."
            )
        self._handle = self._adapting = self._domain = None

    def _undo(self) -> None:
        self._put_back()
        self._due, self._adapted = False, {}

    def _check_late_comparison(self, trainer: Trainer) -> None:
        adapting = [c for c in trainer.callbacks if isinstance(c, AdaBNCallback)]  # type: ignore[attr-defined]
        if self.log_unadapted and adapting[0] is not self:
            raise ValueError(
                "log_unadapted=True is for the first AdaBNCallback in the list alone: when another's turn has come, the "
                "first has adapted its layers already."
            )

    def _warn_of_frozen(self, trainer: Trainer, module: LightningModule) -> None:
        frozen = [name for name in storing_layers(module, self.layers) if name not in self._adapted]
        if frozen:
            everything = "all of its layers are frozen" if not self._adapted else f"{len(frozen)} layers are frozen"
            rank_zero_warn(
                f"AdaBNCallback leaves running statistics as they are: {everything} or in eval mode ({frozen[0]!r} "
                "first), and what is trained with frozen statistics fits those. If they are not: call train() on the "
                "module before."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, FreezeBNCallback):
                theirs = [name for name in find_bn(module, other.layers) if name in self._adapted]
                if theirs:
                    rank_zero_warn(
                        f"AdaBNCallback re-estimates the statistics of layers that FreezeBNCallback has the model "
                        f"trained with ({theirs[0]!r} first). The weights fit the frozen ones: in a trial of ours "
                        "accuracy fell from 77.9 to 48.5 %. Leave them out by layers=, or see by log_unadapted=True."
                    )
