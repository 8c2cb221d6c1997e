"""The leakage pass: what an epoch normalized together, shown to the fixed model once more; and the errors of Fig. 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_bn.core.batch_copy import bytes_of
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_int
from lightning_bn.core.ranks import OUT_OF_MEMORY, agreed, get_rank, get_world_size, sum_over_ranks
from lightning_bn.functional.leakage import BatchLeakage, measure_leakage
from lightning_bn.functional.mini_batch import mini_batch_inference
from lightning_bn.layers.find import Layers, storing_layers
from lightning_bn.trainer.context import PassContext
from lightning_bn.trainer.evaluation import evaluate_isolated
from lightning_bn.trainer.forward import Forward, check_forward, check_forward_argument, isolated_forward
from lightning_bn.trainer.loaders import Reservoir, evaluation_batches, loader_batches
from lightning_bn.trainer.passes import check_sharding

_FEWEST_BATCHES = 4


class LeakagePass:
    """Keeps batches of an epoch, and tests at its end whether they were put together at random.

    Args:
        num_samples: Samples to keep of an epoch, of all ranks together, in four batches or more.
        forward: How a batch reaches the model.
        layers: Glob patterns over the layers to test.
        batch_size_fn: Samples in a batch; None takes what `infer_batch_size` says.
        max_bytes: What the kept batches may take on each rank.
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
        self._count = as_batch_size_fn(batch_size_fn)
        self.max_bytes = max_bytes
        self._kept: Reservoir | None = None
        self._obstacle: Exception | None = None

    def check(self, module: LightningModule, trainer: Trainer) -> None:
        """Refuse at the start what could not be done later, naming the way out.

        Raises:
            ValueError: For a module that cannot be shown batches neutrally, or without layers to test.
            RuntimeError: For a strategy that shards the model.
        """
        storing_layers(module, self.layers)
        check_sharding(trainer)
        check_forward(self.forward, module, "BatchLeakageMonitor")

    def reset(self) -> None:
        """Let go of the batches kept."""
        self._kept = self._obstacle = None

    def keep(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Perhaps keep a batch that is about to be trained on.

        A batch that cannot be kept is no reason to end a training: `run` then raises what was in the way.
        """
        try:
            if self._kept is None:
                self._begin(module.device, batch, seed=trainer.current_epoch)
            elif self._obstacle is None:
                self._keep(self._kept, batch)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            self._obstacle = error

    def _begin(self, device: torch.device, batch: Any, seed: int) -> None:
        """Keep the first batch of an epoch; ranks have places for as many as each other, if all can count it."""
        self._kept = Reservoir(_FEWEST_BATCHES, seed)
        with agreed(device):
            samples = self._count(batch)
        samples, *_ = sum_over_ranks([samples], device)
        self._kept = Reservoir(max(-(-self.num_samples // max(samples, 1)), _FEWEST_BATCHES), seed)
        self._keep(self._kept, batch)

    def _keep(self, kept: Reservoir, batch: Any) -> None:
        needed = bytes_of(batch) * kept.num_batches
        if needed > self.max_bytes:
            raise ValueError(
                f"it keeps {kept.num_batches} batches of an epoch on each rank, and of {bytes_of(batch):,} bytes they "
                f"take {needed:,}, more than max_bytes={self.max_bytes:,}. Raise max_bytes, or lower "
                "num_samples."
            )
        kept.keep(batch)

    def run(self, trainer: Trainer, module: LightningModule) -> BatchLeakage:
        """Test the batches kept on the model as it is; on every rank, or on none.

        Raises:
            Exception: Whatever is in the way, on this rank or another.
        """
        with agreed(module.device):
            if self._obstacle is not None:
                raise self._obstacle
            context = PassContext.of(trainer, module, self.layers)
            if not context.layers:
                raise ValueError("all of its layers are frozen, or in eval mode, and normalize with the population.")
            if self._kept is None or self._kept.held < 2:
                raise ValueError("an epoch of fewer than two batches leaves nothing to compare.")
            batches = enumerate(self._kept.batches())
        with agreed(module.device), isolated_forward(self.forward, context, estimate=False) as run:
            return measure_leakage(
                context.layers, batches, run, lambda item: self._count(item[1]), seed=trainer.current_epoch
            )


def compare_statistics(
    trainer: Trainer,
    module: LightningModule,
    layers: Layers,
    same_pattern: Callable[[Trainer], Iterable[Any]] | None,
    prefix: str,
) -> dict[str, float]:
    """What validation logs with population and with mini-batch statistics, and with the latter in training's pattern.

    Args:
        trainer: The Trainer, while it validates.
        module: Its module.
        layers: Glob patterns over the layers that use mini-batch statistics.
        same_pattern: From the Trainer to a loader of validation samples, put together as in training; None for none.
        prefix: In front of ``/population/key``, ``/mini_batch/key`` and ``/same_pattern/key``.

    Raises:
        ValueError: If that loader has no batches.
        RuntimeError: If another rank met an error.
    """
    found: dict[str, float] = {}
    with agreed(module.device):
        with evaluation_batches(trainer, module) as batches:
            found |= evaluate_isolated(nullcontext(), trainer, module, batches, f"{prefix}/population")
        with evaluation_batches(trainer, module) as batches:
            mini_batch = mini_batch_inference(module, layers=layers)
            found |= evaluate_isolated(mini_batch, trainer, module, batches, f"{prefix}/mini_batch")
        if same_pattern is not None:
            loader = same_pattern(trainer)
            with loader_batches(trainer, module, loader, shard=get_world_size() > 1) as loaded:
                mini_batch = mini_batch_inference(module, layers=layers)
                found |= evaluate_isolated(mini_batch, trainer, module, _numbered(loaded), f"{prefix}/same_pattern")
    return found


def _numbered(loaded: Iterator[Any]) -> Iterator[tuple[Any, int, int]]:
    """Batches of same_pattern's loader, as a validation loop has them."""
    index = -1
    for index, batch in enumerate(loaded):
        yield batch, index, 0
    if index < 0 and get_rank() == 0:  # whose is the first batch, if there is any
        raise ValueError("same_pattern returned a loader without batches: there is nothing to validate on.")
