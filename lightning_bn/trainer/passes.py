"""The population pass: `precise_bn` inside a Trainer, with the batches, forward and modes of its training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from operator import attrgetter
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.batch_sizes import as_batch_size_fn
from lightning_bn.core.checks import NoStopIteration
from lightning_bn.core.gaps import gaps_of_layers
from lightning_bn.core.population import PopulationStatistics
from lightning_bn.core.ranks import OUT_OF_MEMORY, get_world_size
from lightning_bn.functional.measure import MeasureConfig, measure
from lightning_bn.functional.precise import write_running_stats
from lightning_bn.layers.find import Layers, as_patterns, storing_layers
from lightning_bn.lockstep.scheduler import LockstepError
from lightning_bn.lockstep.trial import ModelProfile
from lightning_bn.trainer.compat import train_loaders
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.failures import located
from lightning_bn.trainer.forward import check_call, check_forward, example_forward, isolated_forward, numbered
from lightning_bn.trainer.loaders import ReplayBuffer, check_loader_reiterable, loader_batches, train_batches
from lightning_bn.trainer.logging import progress_of
from lightning_bn.trainer.pass_config import FromLoader, PassConfig, Replay

STATISTICS_KEYS = ("num_batches_tracked", "running_mean")
_CHANGING_KEYS = (*STATISTICS_KEYS, "weight", "bias")


@dataclass(frozen=True)
class PassResult:
    """Holds the layers' new statistics and the duration of a pass.

    ``moved`` maps layer names to mean gap in sigma and variance gap, from the old statistics to the new ones.
    """

    statistics: PopulationStatistics
    moved: dict[str, tuple[float, float]]
    seconds: float

    @classmethod
    def write(cls, layers: Mapping[str, _BatchNorm], statistics: PopulationStatistics, started: float) -> PassResult:
        """Write statistics into layers; the pass began at ``started`` (`time.perf_counter`)."""
        moved = gaps_from_running_stats(layers, statistics)
        write_running_stats(layers, statistics)
        return cls(statistics, moved, time.perf_counter() - started)

    def to_metrics(self, prefix: str) -> dict[str, float]:
        """Return metrics: duration, samples, and the gaps of the median layer and of the worst one."""
        metrics = {"seconds": self.seconds}
        if self.statistics.num_samples:
            metrics |= {"num_samples": float(self.statistics.num_samples), "batch_size": self.statistics.batch_size}
        for gap, values in zip(("mean_gap", "var_gap"), zip(*self.moved.values(), strict=True), strict=True):
            metrics |= {f"{gap}_p50": median(values), f"{gap}_max": max(values)}
        return {f"{prefix}/{key}": value for key, value in metrics.items()}


class LayerSnapshot:
    """Copies statistics and parameters of layers, to find later those that training has changed."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._before = {name: {k: t.detach().clone() for k, t in _tensors(m).items()} for name, m in layers.items()}

    def changed(self, layers: Mapping[str, _BatchNorm], keys: Sequence[str] = _CHANGING_KEYS) -> list[str]:
        """Return the layers of which one of the tensors ``keys`` has changed.

        Weight and bias also change in layers that training reaches without a forward, such as an averaged teacher.
        """
        return [name for name, layer in layers.items() if self._has_changed(name, _tensors(layer), keys)]

    def _has_changed(self, name: str, now: Mapping[str, Tensor], keys: Sequence[str]) -> bool:
        before = self._before.get(name, {})
        return not all(torch.equal(before[k], now[k].to(before[k].device)) for k in keys if k in before and k in now)


@dataclass
class PassState:
    """Holds facts that passes learn in one fit."""

    buffer: ReplayBuffer | None = None
    profile: ModelProfile = field(default_factory=ModelProfile)
    lockstep_failed: bool = False  # the model's batches cannot wait for each other
    saw_first_batch: bool = False
    at_start: LayerSnapshot = field(default_factory=lambda: LayerSnapshot({}))
    warned: set[str] = field(default_factory=set)  # subjects of warnings


class PopulationPass:
    """Runs passes over training data, in the name of the callback ``owner``."""

    def __init__(self, config: PassConfig, layers: Layers, owner: str) -> None:
        as_patterns(layers)  # validates them
        self.config = config
        self.layers = layers
        self.owner = owner
        self.state = PassState()
        self._replay = Replay() if config.source == "replay" else config.source
        self._batch_size_fn = as_batch_size_fn(config.batch_size_fn)
        self._of_numbered: MeasureConfig = replace(config, batch_size_fn=attrgetter("samples"))

    def reset(self, keep_replay: bool = False) -> None:
        """Drop the facts of the last model; a replay's batches may be kept for the evaluation after a fit."""
        self.state = PassState(buffer=self.state.buffer if keep_replay else None)

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise for a module or strategy that a pass cannot run."""
        self.state.at_start = LayerSnapshot(storing_layers(module, self.layers))
        check_sharding(trainer)
        check_forward(self.config.forward, module, self.owner)

    def check_loader(self, trainer: Trainer) -> None:
        """Raise ValueError for a train dataloader that cannot be read a second time."""
        loaders = train_loaders(trainer)
        if self.config.source == "train_dataloader" and loaders is not None:
            check_loader_reiterable(loaders.flattened)

    def on_train_batch(self, module: LightningModule, batch: Any) -> None:
        """Raise if a pass could not run the first training batch of a fit; keep batches for a replay."""
        is_first, self.state.saw_first_batch = not self.state.saw_first_batch, True
        if isinstance(self.config.source, FromLoader):
            return  # its batches may be of another kind
        try:
            if is_first:
                check_call(self.config.forward, module, batch, self.owner)
            if isinstance(self._replay, Replay):
                samples = self._batch_size_fn(batch)
                if self.state.buffer is None:
                    per_rank = -(-self.config.num_samples // get_world_size())
                    self.state.buffer = ReplayBuffer(per_rank, self._replay.max_bytes)
                self.state.buffer.keep(batch, samples)
            elif is_first:
                self._batch_size_fn(batch)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            if is_first:
                raise located(error, self.owner)  # noqa: B904 - it is the error, or has it for a cause
            self._warn_once("replay", f"{self.owner} could not keep a batch for the replay, and skips it: {error}")

    def skip_reason(self) -> str:
        """Return why a pass cannot run now; empty if it can."""
        if not isinstance(self._replay, Replay):
            return ""
        held = (self.state.buffer.held if self.state.buffer else 0) * get_world_size()
        if not held:
            return "there are no batches to replay before the first training batch, nor right after a resume"
        if held < self.config.num_samples:
            rank_zero_info(
                f"{self.owner}: the replay holds {held} of {self.config.num_samples} samples so far, and uses those."
            )
        return ""

    def run(self, context: PassContext) -> PassResult:
        """Estimate the statistics of the model's current weights and write them into its layers."""
        started = time.perf_counter()
        with NoStopIteration("The pass over training batches"):
            statistics = self._measure_with_fallback(context)
        result = PassResult.write(context.layers, statistics, started)
        self._warn_of_unreached(context, statistics)
        return result

    def _measure_with_fallback(self, context: PassContext) -> PopulationStatistics:
        config = self._of_numbered
        if not self.state.lockstep_failed:
            try:
                return self._measure(context, config)
            except LockstepError as error:
                if config.normalization_batch_size != "auto":
                    raise
                rank_zero_warn(
                    f"{self.owner} normalizes each batch alone, not 100 samples jointly: {error} Small normalization "
                    "batches accumulate error in depth (paper, Table 2)."
                )
                self.state.lockstep_failed = True
        return self._measure(context, replace(config, normalization_batch_size="loader", memory_limit=None))

    def _measure(self, context: PassContext, config: MeasureConfig) -> PopulationStatistics:
        forward = isolated_forward(self.config.forward, context, estimate=True)
        with forward as run, self._batches(context) as batches:
            return measure(
                context.layers,
                numbered(batches, self._batch_size_fn),
                run,
                config,
                profile=self.state.profile,
                progress=progress_of(context.trainer),
            )

    def _batches(self, context: PassContext) -> AbstractContextManager[Iterator[Any]]:
        source = self.config.source
        if isinstance(source, FromLoader):
            return loader_batches(context.trainer, context.module, source.fn(context.trainer), source.shard)
        if isinstance(self._replay, Replay):
            assert self.state.buffer is not None  # skip_reason has checked
            return nullcontext(self.state.buffer.batches())
        return train_batches(context.trainer, context.module)

    def _warn_of_unreached(self, context: PassContext, reached: PopulationStatistics) -> None:
        unreached = {name: layer for name, layer in context.layers.items() if name not in reached}
        changed = self.state.at_start.changed(unreached)
        if changed:
            example = example_forward(context.module, self.owner, changed[0].partition(".")[0])
            self._warn_once(
                "unreached",
                f"{self.owner}: the batches of a pass do not reach layer {changed[0]!r} ({len(changed)} in all), which "
                "changes in training: its running statistics are left as they are. Have a function of module and batch "
                f"run it as well, such as {example}, or leave it out by layers=.",
            )

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self.state.warned:
            rank_zero_warn(message)
        self.state.warned.add(subject)


def check_sharding(trainer: Trainer) -> None:
    """Raise RuntimeError for a strategy that shards the model."""
    kinds = {c.__name__ for c in type(trainer.strategy).__mro__}
    sharding = kinds & {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
    if sharding:
        raise RuntimeError(
            f"{sharding.pop()} shards the model over ranks, which lightning_bn does not support: use DDP."
        )


def gaps_from_running_stats(
    layers: Mapping[str, _BatchNorm], statistics: PopulationStatistics
) -> dict[str, tuple[float, float]]:
    """Return mean gap (sigma of the stored statistics) and variance gap of each measured layer."""
    stored = [(layers[n].get_buffer("running_mean"), layers[n].get_buffer("running_var")) for n in statistics]
    measured = [(s.mean, s.var) for s in statistics.values()]
    return dict(zip(statistics, gaps_of_layers(measured, stored), strict=True))


def with_initial_stats(layers: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Select the layers that still have their initial statistics: mean 0 and variance 1."""
    moved = [
        (layer.get_buffer("running_mean") != 0).any() | (layer.get_buffer("running_var") != 1).any()
        for layer in layers.values()
    ]
    found = torch.stack(moved).tolist() if moved else []  # once for all, because each reading waits for the device
    return {name: layer for (name, layer), has_moved in zip(layers.items(), found, strict=True) if not has_moved}


def _tensors(layer: _BatchNorm) -> dict[str, Tensor]:
    tensors = {**layer._buffers, **layer._parameters}
    return {key: t for key in _CHANGING_KEYS if (t := tensors.get(key)) is not None}
