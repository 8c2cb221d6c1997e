"""The leakage pass: what an epoch normalised together, shown to the fixed model once more; and the errors of Fig. 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_bn.distributed.moments import num_ranks, own_rank, sum_over_ranks
from lightning_bn.engine.batches import Reservoir, bytes_of, evaluation_batches, loader_batches
from lightning_bn.engine.evaluate_under import evaluate_under
from lightning_bn.engine.forward import Forward, check_forward, require_forward
from lightning_bn.engine.modes import modes_of_training
from lightning_bn.engine.population_pass import muted_forward, refuse_sharding
from lightning_bn.functional.arguments import require_whole
from lightning_bn.functional.leakage import BatchLeakage, measure_leakage
from lightning_bn.functional.mini_batch import mini_batch_inference
from lightning_bn.functional.precise import estimable_layers
from lightning_bn.functional.samples import Count, counted_by
from lightning_bn.layers.find import Layers, storing_layers

_FEWEST_BATCHES = 4


class LeakagePass:
    """Keeps batches of an epoch, and tests at its end whether they were put together at random.

    Args:
        num_samples: Samples to keep of an epoch, of all ranks together, in four batches or more.
        forward: How a batch reaches the model.
        layers: Glob patterns over the layers to test.
        count: Samples in a batch; None takes the length of its first tensor.
        replay_bytes: What the kept batches may take on each rank.
    """

    def __init__(
        self, num_samples: int, forward: Forward, layers: Layers, count: Count | None, replay_bytes: int
    ) -> None:
        require_whole("num_samples", num_samples, at_least=1)
        require_whole("replay_bytes", replay_bytes, at_least=1)
        require_forward(forward)
        self.num_samples = num_samples
        self.forward = forward
        self.layers = layers
        self._count = counted_by(count)
        self.replay_bytes = replay_bytes
        self._kept: Reservoir | None = None

    def check(self, module: LightningModule, trainer: Trainer) -> None:
        """Refuse at the start what could not be done later, naming the way out.

        Raises:
            ValueError: For a module that cannot be shown batches neutrally, or without layers to test.
            RuntimeError: For a strategy that shards the model.
        """
        storing_layers(module, self.layers)
        refuse_sharding(trainer)
        check_forward(self.forward, module, "BatchLeakageMonitor")

    def forget(self) -> None:
        """Let go of the batches kept."""
        self._kept = None

    def keep(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Perhaps keep a batch that is about to be trained on.

        Raises:
            ValueError: If so many batches of this size do not fit.
        """
        if self._kept is None:
            samples, *_ = sum_over_ranks([self._count(batch)], module.device)
            places = max(-(-self.num_samples // max(samples, 1)), _FEWEST_BATCHES)
            self._kept = Reservoir(places, seed=trainer.current_epoch)
        needed = bytes_of(batch) * self._kept.num_batches
        if needed > self.replay_bytes:
            raise ValueError(
                f"BatchLeakageMonitor keeps {self._kept.num_batches} batches of an epoch on each rank, and of "
                f"{bytes_of(batch):,} bytes they take {needed:,}, more than replay_bytes={self.replay_bytes:,}. Raise "
                "replay_bytes, or lower num_samples."
            )
        self._kept.keep(batch)

    def nothing_to_do(self, trainer: Trainer, module: LightningModule) -> str:
        """Why a test would be pointless now; empty if it would not."""
        if not estimable_layers(module, self.layers, modes_of_training(trainer, module).__getitem__):
            return "all of its layers are frozen, or in eval mode, and normalise with the population"
        held = self._kept.held if self._kept else 0
        return "an epoch of fewer than two batches leaves nothing to compare" if held < 2 else ""

    def run(self, trainer: Trainer, module: LightningModule) -> BatchLeakage | None:
        """Test the batches kept on the model as it is; None if a layer's rows leave nothing to compare.

        Raises:
            RuntimeError: If the training step needs gradients, changes parameters, or raises StopIteration.
        """
        assert self._kept is not None  # nothing_to_do saw to it
        layers = estimable_layers(module, self.layers, modes_of_training(trainer, module).__getitem__)
        try:
            with muted_forward(self.forward, trainer, module) as run:
                batches = enumerate(self._kept.batches(module.device))
                return measure_leakage(layers, batches, run, seed=trainer.current_epoch)
        except StopIteration as error:  # would end Lightning's epoch without a word
            raise RuntimeError("The forward over training batches raised StopIteration.") from error


def three_errors(
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
        RuntimeError: If ``same_pattern`` raises StopIteration.
    """
    found: dict[str, float] = {}
    with evaluation_batches(trainer, module) as batches:
        found |= evaluate_under(nullcontext(), trainer, module, batches, f"{prefix}/population")
    with evaluation_batches(trainer, module) as batches:
        mini_batch = mini_batch_inference(module, layers=layers)
        found |= evaluate_under(mini_batch, trainer, module, batches, f"{prefix}/mini_batch")
    if same_pattern is not None:
        try:
            loader = same_pattern(trainer)
        except StopIteration as error:  # would end Lightning's validation without a word
            raise RuntimeError("same_pattern raised StopIteration.") from error
        with loader_batches(trainer, module, loader, shard=num_ranks() > 1) as loaded:
            mini_batch = mini_batch_inference(module, layers=layers)
            found |= evaluate_under(mini_batch, trainer, module, _numbered(loaded), f"{prefix}/same_pattern")
    return found


def _numbered(loaded: Iterator[Any]) -> Iterator[tuple[Any, int, int]]:
    """Batches of same_pattern's loader, as a validation loop has them."""
    index = -1
    for index, batch in enumerate(loaded):
        yield batch, index, 0
    if index < 0 and own_rank() == 0:  # whose is the first batch, if there is any
        raise ValueError("same_pattern returned a loader without batches: there is nothing to validate on.")
