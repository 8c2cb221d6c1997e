"""The population pass: show training batches to the fixed model of a Trainer, neutrally, and write what its layers saw.

This is `precise_bn` inside a Trainer: the same measurement, with batches, forward, modes and restoration as a running
training needs them. The callbacks decide when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from statistics import median
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.batch_sizes import as_batch_size_fn
from lightning_bn.core.checks import NoStopIteration
from lightning_bn.core.gaps import mean_gap, var_gap
from lightning_bn.core.population import LayerStatistics, PopulationStatistics
from lightning_bn.core.ranks import OUT_OF_MEMORY, get_world_size
from lightning_bn.functional.measure import NormalizationBatchSize, measure
from lightning_bn.functional.measure import PassConfig as MeasureConfig
from lightning_bn.functional.precise import call_model, write_running_stats
from lightning_bn.layers.find import storing_layers
from lightning_bn.lockstep.scheduler import LockstepError
from lightning_bn.trainer.compat import train_loaders
from lightning_bn.trainer.context import PassContext, batch_domain, modes_of_training, set_modes
from lightning_bn.trainer.failures import located
from lightning_bn.trainer.forward import Forward, check_call, check_forward, function_for
from lightning_bn.trainer.isolation import isolate
from lightning_bn.trainer.loaders import ReplayBuffer, check_loader_reiterable, loader_batches, train_batches
from lightning_bn.trainer.logging import progress_of
from lightning_bn.trainer.moved_layers import Movement
from lightning_bn.trainer.numbered_batches import Shown
from lightning_bn.trainer.pass_config import PassConfig, PassState

DEFAULT_BATCH_SIZE = 100
"""Samples in a normalization batch from which on larger ones change nothing (Table 2)."""
TOLERANCE = 0.02
"""Standard error at which validation errors could not be told from those after 10,000 samples (docs/recipes.md)."""


@dataclass(frozen=True)
class PassResult:
    """What a pass has measured and written.

    Attributes:
        statistics: The layers' statistics now.
        moved: Layer name -> by how much they moved: mean gap in sigma, variance gap; both from the old statistics.
        seconds: How long it took.
    """

    statistics: PopulationStatistics
    moved: dict[str, tuple[float, float]]
    seconds: float

    def to_metrics(self, prefix: str) -> dict[str, float]:
        """For loggers: duration, samples, how many together, and how far the median layer and the worst one moved."""
        found = {
            "seconds": self.seconds,
            "num_samples": float(self.statistics.num_samples),
            "batch_size": self.statistics.batch_size,
        }
        for gap, values in zip(("mean_gap", "var_gap"), zip(*self.moved.values(), strict=True), strict=True):
            found.update({f"{gap}_p50": median(values), f"{gap}_max": max(values)})
        return {f"{prefix}/{key}": value for key, value in found.items()}


class PopulationPass:
    """A pass over training data.

    Args:
        config: What was asked for.
        owner: The name of the callback whose passes these are, for messages.
    """

    def __init__(self, config: PassConfig, owner: str) -> None:
        self.config = config
        self.owner = owner
        self.state = PassState()

    def begin(self, fit: bool = True) -> None:
        """Forget what was learned from another model; batches kept for a replay serve until the next fit."""
        self.state = PassState(replay=None if fit else self.state.replay)

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse at the start what could not be done later, naming the way out.

        Raises:
            ValueError: For a model, module or loader that cannot be shown batches neutrally.
            RuntimeError: For a strategy that shards the model.
        """
        self.state.start = Movement(storing_layers(module, self.config.layers))
        check_sharding(trainer)
        check_forward(self.config.forward, module, self.owner)

    def check_loader(self, trainer: Trainer) -> None:
        """Refuse, as soon as it exists, a train dataloader that cannot be read a second time.

        Raises:
            ValueError: Naming the loader and the way out.
        """
        loaders = train_loaders(trainer)
        if self.config.source == "train_dataloader" and loaders is not None:
            check_loader_reiterable(loaders.flattened)

    def look_at(self, module: LightningModule, batch: Any) -> None:
        """Refuse the first training batch of a fit if a pass could not show it; keep batches that are to be replayed.

        Raises:
            Exception: For the first batch: what `check_call`, counting and keeping raise, with the callback's name.
        """
        first, self.state.seen_a_batch = not self.state.seen_a_batch, True
        if callable(self.config.source):
            return  # which may have batches of another kind
        try:
            if first:
                check_call(self.config.forward, module, batch, self.owner)
            if self.config.source == "replay":
                self._keep(batch)
            elif first:
                as_batch_size_fn(self.config.batch_size_fn)(batch)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            if first:
                raise located(error, self.owner)  # noqa: B904 - it is the error, or has it for a cause
            self._say_once(
                "replay", f"{self.owner} could not keep a batch for the replay, and goes on without: {error}"
            )

    def run(self, trainer: Trainer, module: LightningModule) -> PassResult:
        """Recompute the statistics of the model as it is, and write them into its layers.

        Raises:
            ValueError: If no batch came, or all of them gave a layer non-finite values.
            RuntimeError: If the training step needs gradients, or raises StopIteration.
        """
        started = time.perf_counter()
        layers = self._estimable(trainer, module)
        with NoStopIteration("The pass over training batches"):
            statistics = self._measured(trainer, module, layers)
        moved = {name: gaps_from_running_stats(layers[name], measured) for name, measured in statistics.items()}
        write_running_stats(layers, statistics)
        self._say_which_were_not_reached(module, layers, statistics)
        return PassResult(statistics, moved, time.perf_counter() - started)

    def skip_reason(self, trainer: Trainer, module: LightningModule) -> str:
        """Why a pass would be pointless now; empty if it would not. Says so as well where a replay is not yet full."""
        if not self._estimable(trainer, module):
            return "all of its layers are frozen"
        if self.config.source == "replay":
            held = self.state.replay.held if self.state.replay else 0
            if not held:
                return "there are no batches to replay before the first training batch, nor right after a resume"
            if held * get_world_size() < self.config.num_samples:
                rank_zero_info(
                    f"PreciseBN: the replay holds {held * get_world_size()} of {self.config.num_samples} samples so "
                    "far, and uses those."
                )
        return ""

    def _measured(
        self, trainer: Trainer, module: LightningModule, layers: dict[str, _BatchNorm]
    ) -> PopulationStatistics:
        if self.config.normalization_batch_size is not None or self.state.one_by_one:
            return self._measured_at(self.config.normalization_batch_size or 1, trainer, module, layers)
        try:
            return self._measured_at(None, trainer, module, layers)
        except LockstepError as error:
            rank_zero_warn(
                f"{self.owner} takes the batches as they come, not {DEFAULT_BATCH_SIZE} samples together: {error} "
                "Small normalization batches accumulate error in depth (paper, Table 2)."
            )
            self.state.one_by_one = True
            return self._measured_at(1, trainer, module, layers)

    def _measured_at(
        self,
        normalization_batch_size: NormalizationBatchSize | None,
        trainer: Trainer,
        module: LightningModule,
        layers: dict[str, _BatchNorm],
    ) -> PopulationStatistics:
        config = self.config
        default = None if normalization_batch_size == "population" else TOLERANCE
        forward = isolated_forward(config.forward, trainer, module, layers.values())
        with forward as run, self._batches(trainer, module) as batches:
            shown = Shown(batches, as_batch_size_fn(config.batch_size_fn), run, config.forward)
            return measure(
                layers,
                shown,
                shown.run,
                MeasureConfig(
                    config.num_samples,
                    "auto" if normalization_batch_size is None else normalization_batch_size,
                    default if config.tolerance is None else config.tolerance,
                    config.memory_limit,
                    attrgetter("samples"),
                ),
                profile=self.state.tried,
                progress=progress_of(trainer),
            )

    def _batches(self, trainer: Trainer, module: LightningModule) -> AbstractContextManager[Iterator[Any]]:
        source = self.config.source
        if callable(source):
            return loader_batches(trainer, module, source(trainer), self.config.shard)
        return self._replayed() if source == "replay" else train_batches(trainer, module)

    @contextmanager
    def _replayed(self) -> Iterator[Iterator[Any]]:
        assert self.state.replay is not None  # nothing_to_do saw to it
        yield self.state.replay.batches()

    def _keep(self, batch: Any) -> None:
        if self.state.replay is None:
            self.state.replay = ReplayBuffer(-(-self.config.num_samples // get_world_size()), self.config.replay_bytes)
        self.state.replay.keep(batch, as_batch_size_fn(self.config.batch_size_fn)(batch))

    def _estimable(self, trainer: Trainer, module: LightningModule) -> dict[str, _BatchNorm]:
        return PassContext.of(trainer, module, self.config.layers).layers

    def _say_which_were_not_reached(
        self, module: LightningModule, layers: dict[str, _BatchNorm], reached: PopulationStatistics
    ) -> None:
        left = self.state.start.of({name: layer for name, layer in layers.items() if name not in reached})
        if left:
            line = function_for(module, self.owner, left[0].partition(".")[0])
            self._say_once(
                "reach",
                f"{self.owner}: the batches of a pass do not reach layer {left[0]!r} ({len(left)} in all), which "
                "changes in training: its running statistics are left as they are. Have a function of module and batch "
                f"run it as well, such as {line}, or leave it out by layers=.",
            )

    def _say_once(self, about: str, message: str) -> None:
        if about not in self.state.said:
            rank_zero_warn(message)
        self.state.said.add(about)


@contextmanager
def isolated_forward(
    forward: Forward, trainer: Trainer, module: LightningModule, estimated: Collection[nn.Module] = ()
) -> Iterator[Callable[[tuple[int, Any]], None]]:
    """Yields a function that shows a numbered batch to the fixed model, in the modes of a pass, isolated.

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
            with trainer.precision_plugin.train_step_context(), batch_domain(trainer, batch):
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
            with trainer.precision_plugin.forward_context(), batch_domain(trainer, batch):
                (forward if callable(forward) else call_model)(module, batch)

    like_training = forward == "training_step"
    with isolate(trainer, module) as fixed, set_modes(modes, like_training, set(estimated)) as begin:
        yield run


def check_sharding(trainer: Trainer) -> None:
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


def gaps_from_running_stats(layer: _BatchNorm, measured: LayerStatistics) -> tuple[float, float]:
    """How far measured statistics lie from those stored: mean gap in sigma of the stored ones, and variance gap."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None and var is not None  # storing_layers saw to it
    return float(mean_gap(measured.mean, mean, var)), float(var_gap(measured.var, var))
