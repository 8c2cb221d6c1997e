"""The user's settings for a pass over training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning.pytorch import Trainer

from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.functional.measure import MeasureConfig, NormalizationBatchSize
from lightning_bn.trainer.forward import Forward, check_forward_argument


@dataclass(frozen=True)
class Replay:
    """Sets the last training batches, kept in main memory, as the source of a pass.

    ``"replay"`` is short for ``Replay()``. It suits loaders that cannot be read twice, such as streams. It does not
    help right after a resume, when no batches are kept.

    Args:
        max_bytes: Memory limit of the kept batches on each rank; the default holds 1700 images of 224 px in float32.

    Raises:
        TypeError: If ``max_bytes`` is not an integer.
        ValueError: If it is less than 1.

    Example:
        >>> from lightning_bn import PreciseBNCallback, Replay
        >>> callback = PreciseBNCallback(source=Replay(max_bytes=2**32))
    """

    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        check_int("Replay: max_bytes", self.max_bytes, at_least=1)


@dataclass(frozen=True)
class FromLoader:
    """Sets a loader of the user as the source of a pass.

    Its samples must be distributed and augmented as in training: other samples give other statistics.

    Args:
        fn: Called with the Trainer at each pass; returns any iterable of batches.
        shard: Each rank takes every n-th batch; False: each rank takes all of them.

    Raises:
        TypeError: If ``fn`` is not callable, or ``shard`` is not a bool.

    Example:
        >>> from lightning_bn import FromLoader, PreciseBNCallback
        >>> source = FromLoader(lambda trainer: trainer.datamodule.train_dataloader())
        >>> callback = PreciseBNCallback(source=source)
    """

    fn: Callable[[Trainer], Iterable[Any]]
    shard: bool = True

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"FromLoader: fn must be a function from the Trainer to a loader but is {self.fn!r}.")
        check_bool("FromLoader: shard", self.shard)


Source: TypeAlias = Literal["train_dataloader", "replay"] | Replay | FromLoader
"""The batches of a pass: a fresh iterator over the train dataloader, the last training batches, or a loader."""

DEFAULT_TOLERANCE = 0.02
"""Standard error at which validation errors did not differ from those after 10,000 samples (docs/recipes.md)."""


@dataclass(frozen=True)
class PassConfig(MeasureConfig):
    """Sets how many samples a pass over training data reads, from which source, and how they reach the model.

    `PreciseBNCallback` has arguments of the same names, and explains when they do not help.

    Args:
        num_samples: Samples of all ranks, in whole batches.
        normalization_batch_size: Samples of all ranks that are normalized jointly.
        tolerance: Stop early when all standard errors are below it; None, and ``"population"``, never stop early.
        memory_limit: Bytes that batches waiting for each other may take on each rank.
        batch_size_fn: Returns the number of samples in a batch; None infers it.
        source: The batches: the train dataloader, the last training batches, or a loader.
        forward: The training step, ``forward``, or a function of module and batch.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or contradicts another one.

    Example:
        >>> from lightning_bn import PassConfig
        >>> config = PassConfig(num_samples=2000, forward="forward")
    """

    num_samples: int = 1000
    normalization_batch_size: NormalizationBatchSize = "auto"
    tolerance: float | None = DEFAULT_TOLERANCE
    memory_limit: int | None = None
    batch_size_fn: BatchSizeFn | None = None
    source: Source = "train_dataloader"
    forward: Forward = "training_step"

    def __post_init__(self) -> None:
        check_int("num_samples", self.num_samples, at_least=1)
        if self.normalization_batch_size == "population" and self.tolerance == DEFAULT_TOLERANCE:
            object.__setattr__(self, "tolerance", None)  # the default is for sampled passes
        super().__post_init__()
        check_forward_argument(self.forward)
        if callable(self.source):
            name = getattr(self.source, "__name__", "function")
            raise TypeError(f"source must not be a bare function: pass source=FromLoader({name}), of lightning_bn.")
        if not isinstance(self.source, (Replay, FromLoader)) and self.source not in ("train_dataloader", "replay"):
            raise ValueError(
                "source must be 'train_dataloader', 'replay', Replay(max_bytes=...) or FromLoader(fn) but is "
                f"{self.source!r}."
            )
