"""The population pass: show training batches to the fixed model of a Trainer, neutrally, and write what its layers saw.

This is `precise_bn` inside a Trainer: the same measurement, with batches, forward, modes and restoration as a running
training needs them. The callbacks decide when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.distributed.moments import num_ranks
from lightning_bn.engine.batches import (
    Replay,
    Source,
    loader_batches,
    refuse_unprotectable,
    train_batches,
)
from lightning_bn.engine.domains import domains_of
from lightning_bn.engine.modes import modes_of_training, set_modes
from lightning_bn.engine.neutral import neutral
from lightning_bn.engine.progress import progress_of
from lightning_bn.functional.arguments import require_whole
from lightning_bn.functional.lockstep import LockstepError
from lightning_bn.functional.measure import BatchSize, check_amounts, measure
from lightning_bn.functional.pooled import Tried
from lightning_bn.functional.precise import call_model, estimable_layers, write
from lightning_bn.functional.samples import Count, counted_by
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.statistics.gaps import mean_gap, var_gap
from lightning_bn.statistics.population import LayerStatistics, PopulationStatistics

Forward: TypeAlias = Literal["training_step", "forward"] | Callable[[LightningModule, Any], Any]
"""How a batch reaches the model: the muted training step, ``forward``, or a function of module and batch."""

ENOUGH = 100
"""Samples in a normalization batch from which on larger ones change nothing (Table 2)."""
TOLERANCE = 0.02
"""Standard error at which validation errors could not be told from those after 10,000 samples (docs/recipes.md)."""
REPLAY_BYTES = 2**30
"""What replayed batches may take by default: 1700 images of 224 px in float32."""


@dataclass(frozen=True)
class Recomputed:
    """What a pass has measured and written.

    Attributes:
        statistics: The layers' statistics now.
        moved: Layer name -> by how much they moved: mean gap in sigma, variance gap; both from the old statistics.
        seconds: How long it took.
    """

    statistics: PopulationStatistics
    moved: dict[str, tuple[float, float]]
    seconds: float

    def figures(self, prefix: str) -> dict[str, float]:
        """For loggers: duration, samples, how many together, and how far the median layer and the worst one moved."""
        found = {
            "seconds": self.seconds,
            "num_samples": float(self.statistics.num_samples),
            "batch_size": self.statistics.batch_size,
        }
        for gap, values in zip(("mean_gap", "var_gap"), zip(*self.moved.values(), strict=True), strict=True):
            found.update({f"{gap}_p50": median(values), f"{gap}_max": max(values)})
        return {f"{prefix}/{key}": value for key, value in found.items()}


@dataclass
class PopulationPass:
    """What a pass shows to the model.

    Attributes:
        num_samples: Samples to show, of all ranks together, in whole batches.
        source: Where batches come from.
        forward: How a batch reaches the model.
        layers: Glob patterns over the layers to estimate.
        count: Samples in a batch; None takes the length of its first tensor.
        shard: Whether ranks share the batches of a ``source`` function, or take all of them each.
        replay_bytes: What the replayed batches may take on each rank.
        batch_size: Samples of all ranks to normalise together; by default the 100 that suffice (Table 2), or as many as
            fit into half of the memory that is free.
        tolerance: Stop early, once standard errors are below it; by default 0.02, and never with the population as one.
        memory_limit: Bytes that batches waiting for each other may take on each rank.
    """

    num_samples: int
    source: Source
    forward: Forward
    layers: Layers
    count: Count | None
    shard: bool
    replay_bytes: int
    batch_size: BatchSize = None
    tolerance: float | None = None
    memory_limit: int | None = None
    _replay: Replay | None = field(default=None, init=False, repr=False)
    _tried: Tried = field(default_factory=Tried, init=False, repr=False)
    _said: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_amounts(self.batch_size, self.num_samples, self.tolerance, self.memory_limit)
        require_whole("replay_bytes", self.replay_bytes, at_least=1)
        as_patterns(self.layers)
        counted_by(self.count)  # refuses what is no function
        if not callable(self.source) and self.source not in ("train_dataloader", "replay"):
            raise ValueError(
                f"source must be 'train_dataloader', 'replay' or a function of the trainer but is {self.source!r}."
            )
        require_forward(self.forward)

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse at the start what could not be done later, naming the way out.

        Raises:
            ValueError: For a model, module or loader that cannot be shown batches neutrally.
            RuntimeError: For a strategy that shards the model.
        """
        storing_layers(module, self.layers)
        refuse_sharding(trainer)
        check_forward(self.forward, module)

    def check_loader(self, trainer: Trainer) -> None:
        """Refuse, as soon as it exists, a train dataloader that cannot be read a second time.

        Raises:
            ValueError: Naming the loader and the way out.
        """
        if self.source == "train_dataloader" and trainer.fit_loop._combined_loader is not None:
            refuse_unprotectable(trainer.fit_loop._combined_loader.flattened)

    def keep(self, batch: Any) -> None:
        """Keep a training batch that is about to be used, if batches are to be replayed."""
        if self.source == "replay":
            if self._replay is None:
                self._replay = Replay(-(-self.num_samples // num_ranks()), self.replay_bytes)
            self._replay.keep(batch, counted_by(self.count)(batch))

    def forget(self) -> None:
        """Let go of the batches kept for a replay."""
        self._replay = None

    def run(self, trainer: Trainer, module: LightningModule) -> Recomputed:
        """Recompute the statistics of the model as it is, and write them into its layers.

        Raises:
            ValueError: If no batch came, or a layer received non-finite values.
            RuntimeError: If the training step needs gradients, or raises StopIteration.
        """
        started = time.perf_counter()
        layers = estimable_layers(module, self.layers, modes_of_training(trainer, module).__getitem__)
        try:
            try:
                statistics = self._measured(trainer, module, layers, self.batch_size)
            except LockstepError as error:
                if self.batch_size is not None:
                    raise
                rank_zero_warn(
                    f"PreciseBN takes the batches as they come, instead of {ENOUGH} samples together: {error} Small "
                    "normalization batches accumulate error in depth (paper, Table 2)."
                )
                self.batch_size = 1
                statistics = self._measured(trainer, module, layers, self.batch_size)
        except StopIteration as error:  # would end Lightning's epoch without a word
            raise RuntimeError("The forward over training batches raised StopIteration.") from error
        moved = {name: moved_by(layers[name], measured) for name, measured in statistics.items()}
        write(layers, statistics)
        return Recomputed(statistics, moved, time.perf_counter() - started)

    def _measured(
        self,
        trainer: Trainer,
        module: LightningModule,
        layers: dict[str, _BatchNorm],
        batch_size: BatchSize,
    ) -> PopulationStatistics:
        count = counted_by(self.count)
        default = None if batch_size == "population" else TOLERANCE
        shown = muted_forward(self.forward, trainer, module, layers.values())
        with shown as run, self._batches(trainer, module) as batches:
            return measure(
                layers,
                enumerate(batches),
                run=run,
                batch_size=ENOUGH if batch_size is None else batch_size,
                num_samples=self.num_samples,
                tolerance=default if self.tolerance is None else self.tolerance,
                memory_limit=self.memory_limit,
                at_most=0.5 if batch_size is None and self.memory_limit is None else None,
                say=self._say_once,
                tried=self._tried,
                count=lambda item: count(item[1]),
                progress=progress_of(trainer),
            )

    def _say_once(self, message: str) -> None:
        if not self._said:
            rank_zero_warn(message)
        self._said = True

    def _batches(self, trainer: Trainer, module: LightningModule) -> AbstractContextManager[Iterator[Any]]:
        if callable(self.source):
            return loader_batches(trainer, module, self.source(trainer), self.shard)
        return self._replayed() if self.source == "replay" else train_batches(trainer, module)

    def nothing_to_do(self, trainer: Trainer, module: LightningModule) -> str:
        """Why a pass would be pointless now; empty if it would not. Says so as well where a replay is not yet full."""
        if not estimable_layers(module, self.layers, modes_of_training(trainer, module).__getitem__):
            return "all of its layers are frozen"
        if self.source == "replay":
            held = self._replay.held if self._replay else 0
            if not held:
                return "there are no batches to replay before the first training batch, nor right after a resume"
            if held * num_ranks() < self.num_samples:
                rank_zero_info(
                    f"PreciseBN: the replay holds {held * num_ranks()} of {self.num_samples} samples so far, and "
                    "uses those."
                )
        return ""

    @contextmanager
    def _replayed(self) -> Iterator[Iterator[Any]]:
        assert self._replay is not None  # nothing_to_do saw to it
        yield self._replay.batches()


@contextmanager
def muted_forward(
    forward: Forward, trainer: Trainer, module: LightningModule, estimated: Collection[nn.Module] = ()
) -> Iterator[Callable[[tuple[int, Any]], None]]:
    """What shows a batch, which comes with its number, to the fixed model, in the modes of a pass and a `neutral` zone.

    Of its layers those to be ``estimated`` are in train mode when a forward begins, see `set_modes`.

    Raises:
        RuntimeError: If the training step needs gradients.
    """
    modes = modes_of_training(trainer, module)
    with_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def run(item: tuple[int, Any]) -> None:
        number, batch = item
        begin()
        with fixed():
            show(number, batch)

    def show(number: int, batch: Any) -> None:
        if forward == "training_step":
            with trainer.precision_plugin.train_step_context(), domains_of(trainer, batch):
                try:
                    module.training_step(*((batch, number) if with_index else (batch,)))
                except RuntimeError as error:
                    if "does not require grad" in str(error):
                        raise RuntimeError(
                            f"{type(module).__name__}.training_step needs gradients itself, and a pass runs "
                            "without: pass forward='forward' or a function of module and batch."
                        ) from error
                    raise
        else:
            with trainer.precision_plugin.forward_context(), domains_of(trainer, batch):
                (forward if callable(forward) else call_model)(module, batch)

    like_training = forward == "training_step"
    with neutral(trainer, module) as fixed, set_modes(modes, like_training, set(estimated)) as begin:
        yield run


def require_forward(forward: Any) -> None:
    """Raise for something that says not how a batch reaches the model.

    Raises:
        ValueError: If it is none of `Forward`.
    """
    if not callable(forward) and forward not in ("training_step", "forward"):
        raise ValueError(f"forward must be 'training_step', 'forward' or a function but is {forward!r}.")


def check_forward(forward: Forward, module: LightningModule) -> None:
    """Refuse a training step that cannot be run by a pass.

    Raises:
        ValueError: Naming the way out.
    """
    if forward != "training_step":
        return
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually, so its training_step would take optimizer steps: "
            "pass forward='forward' or a function of module and batch."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{type(module).__name__}.training_step takes a dataloader_iter and fetches batches itself: pass "
            "forward='forward' or a function of module and batch."
        )


def refuse_sharding(trainer: Trainer) -> None:
    """Raise for a strategy that shards the model.

    Raises:
        RuntimeError: Naming it, and the way out.
    """
    kinds = {c.__name__ for c in type(trainer.strategy).__mro__}
    sharding = kinds & {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
    if sharding:
        raise RuntimeError(
            f"{sharding.pop()} shards the model over ranks, which lightning_bn does not support: use DDP."
        )


def moved_by(layer: _BatchNorm, measured: LayerStatistics) -> tuple[float, float]:
    """How far measured statistics lie from those stored: mean gap in sigma of the stored ones, and variance gap."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None and var is not None  # storing_layers saw to it
    return float(mean_gap(measured.mean, mean, var)), float(var_gap(measured.var, var))
