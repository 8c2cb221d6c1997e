"""What a population pass is asked for, checked once and never changed; and what it learns, for one fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.functional import measure
from lightning_bn.functional.measure import NormalizationBatchSize
from lightning_bn.layers.find import Layers, as_patterns
from lightning_bn.lockstep.pooled import ModelProfile
from lightning_bn.trainer.forward import Forward, check_forward_argument
from lightning_bn.trainer.loaders import ReplayBuffer, Source
from lightning_bn.trainer.moved_layers import Movement

REPLAY_BYTES = 2**30
"""What replayed batches may take by default: 1700 images of 224 px in float32."""


@dataclass(frozen=True)
class PassConfig:
    """What a pass shows to the model.

    Attributes:
        num_samples: Samples to show, of all ranks together, in whole batches.
        source: Where batches come from.
        forward: How a batch reaches the model.
        layers: Glob patterns over the layers to estimate.
        batch_size_fn: Samples in a batch; None takes what `infer_batch_size` says.
        shard: Whether ranks share the batches of a ``source`` function, or take all of them each.
        replay_bytes: What the replayed batches may take on each rank.
        normalization_batch_size: Samples of all ranks to normalize together; by default the 100 that suffice (Table 2), or as many as
            fit into half of the memory that is free.
        tolerance: Stop early, once standard errors are below it; by default 0.02, and never with the population as one.
        memory_limit: Bytes that batches waiting for each other may take on each rank.
    """

    num_samples: int
    source: Source
    forward: Forward
    layers: Layers
    batch_size_fn: BatchSizeFn | None
    shard: bool = True
    replay_bytes: int = REPLAY_BYTES
    normalization_batch_size: NormalizationBatchSize | None = None
    tolerance: float | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        check_int("num_samples", self.num_samples, at_least=1)
        size = "auto" if self.normalization_batch_size is None else self.normalization_batch_size
        measure.PassConfig(self.num_samples, size, self.tolerance, self.memory_limit, self.batch_size_fn)
        check_int("replay_bytes", self.replay_bytes, at_least=1)
        check_bool("shard", self.shard)
        as_patterns(self.layers)
        as_batch_size_fn(self.batch_size_fn)  # refuses what is no function
        if not callable(self.source) and self.source not in ("train_dataloader", "replay"):
            raise ValueError(
                f"source must be 'train_dataloader', 'replay' or a function of the trainer but is {self.source!r}."
            )
        check_forward_argument(self.forward)


@dataclass
class PassState:
    """What is learned from one fit of one model; made anew for every other.

    Attributes:
        replay: The last training batches, if batches are to be replayed.
        tried: What is known of the model's micro-batches.
        one_by_one: Whether they cannot wait for each other.
        seen_a_batch: Whether a training batch was looked at.
        start: How the layers were when the fit began.
        said: Warnings given, by what they are about.
    """

    replay: ReplayBuffer | None = None
    tried: ModelProfile = field(default_factory=ModelProfile)
    one_by_one: bool = False
    seen_a_batch: bool = False
    start: Movement = field(default_factory=lambda: Movement({}))
    said: set[str] = field(default_factory=set)


def check_no_pass_arguments(given: Mapping[str, Any], defaults: Mapping[str, Parameter]) -> None:
    """Raise if an option of a pass is given where there is none.

    Raises:
        ValueError: Naming it.
    """
    for name, value in given.items():
        if value != defaults[name].default:
            raise ValueError(
                f"{name}={value!r} is for a pass over data, and source='training' runs none: leave it out, or choose "
                "another source."
            )
