"""The leakage pass, which runs the fixed model again on batches of the last epoch, and the errors of Fig. 8."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_bn.core.batch_copy import HostCopy, bytes_of
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_int
from lightning_bn.core.ranks import OUT_OF_MEMORY, agreed, get_rank, get_world_size, sum_over_ranks
from lightning_bn.functional.leakage import BatchLeakage, measure_leakage
from lightning_bn.functional.mini_batch import mini_batch_inference
from lightning_bn.layers.find import Layers, storing_layers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.evaluation import evaluate_isolated
from lightning_bn.trainer.forward import Forward, check_forward, check_forward_argument, isolated_forward
from lightning_bn.trainer.loaders import evaluation_batches, loader_batches
from lightning_bn.trainer.passes import check_sharding

_MIN_BATCHES = 4


class BatchReservoir:
    """Holds a random sample of an epoch's batches on the CPU, of the same steps on ranks with one seed."""

    def __init__(self, num_batches: int, seed: int) -> None:
        self.num_batches = num_batches
        self._random = random.Random(seed)
        self._num_seen = 0
        self._batches: list[HostCopy] = []

    @property
    def held(self) -> int:
        """Count the batches held now."""
        return len(self._batches)

    def keep(self, batch: Any) -> None:
        """Copy a batch in place of another, or ignore it, before the training step can change it."""
        place = self._num_seen if self.held < self.num_batches else self._random.randrange(self._num_seen + 1)
        self._num_seen += 1
        if place < self.num_batches:
            self._batches[place : place + 1] = [HostCopy(batch)]

    def batches(self) -> Iterator[Any]:
        """Return copies of the batches, on their original devices."""
        return (kept.batch() for kept in self._batches)


class LeakagePass:
    """Keeps batches of an epoch, and tests at its end whether they were composed at random.

    It keeps ``num_samples`` of all ranks, in four batches or more, and at most ``max_bytes`` on each rank.
    """

    def __init__(
        self, num_samples: int, forward: Forward, layers: Layers, batch_size_fn: BatchSizeFn | None, max_bytes: int
    ) -> None:
        check_int("num_samples", num_samples, at_least=1)
        check_int("max_bytes", max_bytes, at_least=1)
        check_forward_argument(forward)
        self.num_samples = num_samples
        self.forward = forward
        self.layers = layers
        self.max_bytes = max_bytes
        self._batch_size_fn = as_batch_size_fn(batch_size_fn)
        self._reservoir: BatchReservoir | None = None
        self._error: Exception | None = None

    def check(self, module: LightningModule, trainer: Trainer) -> None:
        storing_layers(module, self.layers)
        check_sharding(trainer)
        check_forward(self.forward, module, "BatchLeakageMonitor")

    def reset(self) -> None:
        self._reservoir = self._error = None

    def keep(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Keep a batch that is about to be trained on, or none; `run` raises the error if that fails."""
        try:
            if self._reservoir is None:
                self._begin(module.device, batch, seed=trainer.current_epoch)
            elif self._error is None:
                self._keep(self._reservoir, batch)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            self._error = error

    def _begin(self, device: torch.device, batch: Any, seed: int) -> None:
        # in place before the exchange below: a rank that fails in it must not enter it again at the next batch
        self._reservoir = BatchReservoir(_MIN_BATCHES, seed)
        with agreed(device):
            samples = self._batch_size_fn(batch)
        samples, *_ = sum_over_ranks([samples], device)
        self._reservoir = BatchReservoir(max(-(-self.num_samples // max(samples, 1)), _MIN_BATCHES), seed)
        self._keep(self._reservoir, batch)

    def _keep(self, reservoir: BatchReservoir, batch: Any) -> None:
        num_bytes = bytes_of(batch)
        needed = num_bytes * reservoir.num_batches
        if needed > self.max_bytes:
            raise ValueError(
                f"it would keep up to {reservoir.num_batches} batches of {num_bytes:,} bytes on each rank, {needed:,} "
                f"bytes, which is more than max_bytes={self.max_bytes:,}. Raise max_bytes, or lower num_samples."
            )
        reservoir.keep(batch)

    def run(self, trainer: Trainer, module: LightningModule) -> BatchLeakage:
        """Test the kept batches on the current model; all ranks do, or all raise."""
        with agreed(module.device):
            if self._error is not None:
                raise self._error
            context = PassContext.of(trainer, module, self.layers)
            if not context.layers:
                raise ValueError("all of its layers are frozen, or in eval mode, and normalize with the population.")
            if self._reservoir is None or self._reservoir.held < 2:
                raise ValueError("an epoch of fewer than two batches leaves nothing to compare.")
            batches = enumerate(self._reservoir.batches())
        with agreed(module.device), isolated_forward(self.forward, context, estimate=False) as run:
            return measure_leakage(
                context.layers, batches, run, lambda item: self._batch_size_fn(item[1]), seed=trainer.current_epoch
            )


def compare_statistics(
    trainer: Trainer,
    module: LightningModule,
    layers: Layers,
    same_pattern: Callable[[Trainer], Iterable[Any]] | None,
    prefix: str,
) -> dict[str, float]:
    """Return validation metrics with population, with mini-batch, and with mini-batch statistics in training's pattern.

    ``same_pattern`` returns, from the Trainer, a loader of validation samples that are batched as in training. The keys
    begin with ``prefix`` and ``/population``, ``/mini_batch`` or ``/same_pattern``.
    """
    metrics: dict[str, float] = {}
    with agreed(module.device):
        with evaluation_batches(trainer, module) as batches:
            metrics |= evaluate_isolated(nullcontext(), trainer, module, batches, f"{prefix}/population")
        with evaluation_batches(trainer, module) as batches:
            mini_batch = mini_batch_inference(module, layers=layers)
            metrics |= evaluate_isolated(mini_batch, trainer, module, batches, f"{prefix}/mini_batch")
        if same_pattern is not None:
            with loader_batches(trainer, module, same_pattern(trainer), shard=get_world_size() > 1) as loaded:
                mini_batch = mini_batch_inference(module, layers=layers)
                items = _as_validation_batches(loaded)
                metrics |= evaluate_isolated(mini_batch, trainer, module, items, f"{prefix}/same_pattern")
    return metrics


def _as_validation_batches(batches: Iterator[Any]) -> Iterator[tuple[Any, int, int]]:
    index = -1
    for index, batch in enumerate(batches):
        yield batch, index, 0
    if index < 0 and get_rank() == 0:  # another rank's shard may be empty
        raise ValueError("same_pattern returned a loader without batches: there is nothing to validate on.")
