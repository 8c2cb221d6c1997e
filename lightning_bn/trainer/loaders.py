"""Batches for a pass: of the train dataloader behind its live iterator's back, replayed, or of the user's loader."""

from __future__ import annotations

import copy
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Sampler

from lightning_bn.core.batch_copy import HostCopy, bytes_of
from lightning_bn.core.ranks import get_rank, get_world_size, sum_over_ranks
from lightning_bn.trainer.compat import (
    batch_to_device,
    combination_mode,
    evaluation_loaders,
    evaluation_loop,
    train_loaders,
    unwrap_batch_sampler,
)
from lightning_bn.trainer.stateful_objects import CONTAINERS, find_stateful_objects, snapshot_state


@contextmanager
def train_batches(trainer: Trainer, module: LightningModule) -> Iterator[Iterator[Any]]:
    """This rank's batches of the train dataloader, from a fresh iterator, on the device.

    In a fit the Trainer's own loader is read, with its sampler and limits. Outside one there is none: the module's
    or data module's is, shared out over ranks.

    Raises:
        ValueError: If reading the loader would disturb the training, or if there is none.
    """
    if trainer.state.fn != "fit":
        with loader_batches(trainer, module, own_train_dataloader(trainer, module), shard=True) as batches:
            yield batches
        return
    live = train_loaders(trainer)
    assert live is not None
    fresh = CombinedLoader(tree_map(_FreshIterator, live.iterables), combination_mode(live))
    limit = trainer.num_training_batches  # a CombinedLoader does not keep to its own
    check_loader_reiterable(live.flattened)
    with _preserve_loader_state(live.flattened):
        try:
            batches = itertools.islice(fresh, None if limit == float("inf") else int(limit))
            yield (batch_to_device(trainer, module, batch) for batch, *_ in batches)
        finally:
            fresh.reset()  # ends the workers


@contextmanager
def evaluation_batches(
    trainer: Trainer, module: LightningModule, dataloader_idx: int | None = None
) -> Iterator[Iterator[tuple[Any, int, int]]]:
    """This rank's batches of the loaders that are evaluated now, or of one, from fresh iterators, on the device.

    Yields:
        An iterator of each batch, its index in its loader, and the index of the loader; the latter is always 0 where
        the loaders are read side by side.

    Raises:
        ValueError: If reading a loader a second time would disturb the evaluation.
    """
    live = evaluation_loaders(trainer)
    mode = combination_mode(live)
    check_loader_reiterable(
        live.flattened,
        "evaluated dataloader",
        "Give the Trainer a plain DataLoader or, with AdaBN, take batches as they come: online=True, log_unadapted=False.",
    )
    loaders: Any = tree_map(_FreshIterator, live.iterables)
    if dataloader_idx is not None and mode == "sequential":
        # starts no other's workers
        loaders = [_FreshIterator(loader if i == dataloader_idx else []) for i, loader in enumerate(live.flattened)]
    limits = evaluation_loop(trainer).max_batches
    fresh = CombinedLoader(loaders, mode)
    fresh.limits = limits
    limit = sum(limits) if mode == "sequential" else max(limits)  # not every mode keeps to its limits

    def on_device() -> Iterator[tuple[Any, int, int]]:
        # begun by the reader, whose random numbers are kept, not here
        for batch, n, index in itertools.islice(fresh, None if limit == float("inf") else int(limit)):
            yield batch_to_device(trainer, module, batch, index), n, index

    with _preserve_loader_state(live.flattened):
        try:
            yield on_device()
        finally:
            fresh.reset()  # ends the workers


@contextmanager
def loader_batches(
    trainer: Trainer, module: LightningModule, loader: Iterable[Any], shard: bool
) -> Iterator[Iterator[Any]]:
    """This rank's batches of a loader of the user, on the device.

    Args:
        trainer: The Trainer, whose ranks share the batches.
        module: Its module, whose batch transfer hooks run.
        loader: Any iterable of batches.
        shard: Whether each rank takes every n-th batch (all start from the same random seed), or all of them.
    """
    ranks = get_world_size() if shard else 1
    if ranks > 1:
        seed, *_ = sum_over_ranks([random.getrandbits(31) if get_rank() == 0 else 0], module.device)
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(seed)
    if isinstance(loader, Mapping):  # of loaders, as Lightning combines them
        combined = CombinedLoader(tree_map(_FreshIterator, loader), "max_size_cycle")
        loader = (batch for batch, *_ in combined)
    with _preserve_loader_state([loader]):
        batches = iter(_FreshIterator(loader))
        own = itertools.islice(batches, get_rank() if ranks > 1 else 0, None, ranks)
        yield (batch_to_device(trainer, module, batch) for batch in own)


def own_train_dataloader(trainer: Trainer, module: LightningModule) -> Iterable[Any]:
    """The train dataloader that a data module or module defines, for ``trainer.validate``, ``test`` and ``predict``."""
    assert trainer.state.fn is not None
    verb = trainer.state.fn.value
    for owner in (getattr(trainer, "datamodule", None), module):
        # not by Lightning's is_overridden, which does not know pytorch_lightning's modules
        if owner is not None and not owner.train_dataloader.__qualname__.startswith("DataHooks."):
            try:
                loader: Iterable[Any] = owner.train_dataloader()
            except AttributeError as error:
                raise ValueError(
                    f"{type(owner).__name__}.train_dataloader fails under trainer.{verb}, for which its setup made no "
                    f"training data ({error}): make them in setup for every stage, or pass "
                    "source=FromLoader(fn), with a function from the Trainer to a loader."
                ) from error
            return loader
    raise ValueError(
        f"trainer.{verb} has no training data to recompute population statistics from: define "
        "train_dataloader in the LightningModule or DataModule, or pass source=FromLoader(fn), with a function "
        "from the Trainer to a loader."
    )


class ReplayBuffer:
    """The last training batches, kept on the CPU, as many as hold a number of samples.

    Args:
        num_samples: Samples to hold on this rank.
        max_bytes: What they may take.
    """

    def __init__(self, num_samples: int, max_bytes: int) -> None:
        self.num_samples = num_samples
        self.max_bytes = max_bytes
        self._batches: deque[tuple[HostCopy, int]] = deque()

    @property
    def held(self) -> int:
        """Samples held at the moment."""
        return sum(samples for _, samples in self._batches)

    def keep(self, batch: Any, samples: int) -> None:
        """Keep a copy of a batch, before the training step can change it, and let go of the oldest that is not needed.

        Raises:
            ValueError: If so many samples of this size do not fit.
            TypeError: If the batch cannot be copied.
        """
        if samples < 1:
            return
        num_bytes = bytes_of(batch)
        needed = num_bytes * max(self.num_samples / samples, 1)
        if needed > self.max_bytes:
            raise ValueError(
                f"source='replay': {self.num_samples} samples a rank of {num_bytes / samples:,.0f} bytes "
                f"take {needed:,.0f} bytes, more than max_bytes={self.max_bytes:,}. Raise it by "
                "source=Replay(max_bytes=...), or lower num_samples."
            )
        self._batches.append((HostCopy(batch), samples))
        while self.held - self._batches[0][1] >= self.num_samples:
            self._batches.popleft()

    def batches(self) -> Iterator[Any]:
        """Copies of the batches held, newest first, on the device where they were."""
        return (kept.batch() for kept, _ in reversed(self._batches))


class Reservoir:
    """Some training batches of an epoch, each as likely as any other, to show them to the model once more at its end.

    Spread over the whole epoch, because the last ones of an epoch that comes in order would be too much alike. Kept as
    `ReplayBuffer` keeps its batches.

    Args:
        num_batches: How many to hold.
        seed: Of the choice; ranks that have the same hold batches of the same steps.
    """

    def __init__(self, num_batches: int, seed: int) -> None:
        self.num_batches = num_batches
        self._random = random.Random(seed)
        self._shown = 0
        self._batches: list[HostCopy] = []

    @property
    def held(self) -> int:
        """Batches held at the moment."""
        return len(self._batches)

    def keep(self, batch: Any) -> None:
        """Perhaps keep a copy of a batch, before the training step can change it, in the place of another.

        Raises:
            TypeError: If the batch cannot be copied.
        """
        place = self._shown if self.held < self.num_batches else self._random.randrange(self._shown + 1)
        self._shown += 1
        if place < self.num_batches:
            self._batches[place : place + 1] = [HostCopy(batch)]

    def batches(self) -> Iterator[Any]:
        """Copies of the batches held, on the device where they were."""
        return (kept.batch() for kept in self._batches)


def check_loader_reiterable(
    loaders: Sequence[Any],
    kind: str = "train dataloader",
    way_out: str = "Use source='replay', or source=FromLoader(fn), with a function from the Trainer to another loader.",
) -> None:
    """Raise for a loader that cannot be read a second time while it is being read.

    Raises:
        ValueError: Naming the loader, why, and the way out.
    """
    for loader in loaders:
        name = type(loader).__name__
        parts = [getattr(loader, "sampler", None), unwrap_batch_sampler(loader)[0], getattr(loader, "dataset", None)]
        stateful = [
            type(p).__name__ for p in (loader, *parts) if hasattr(p, "state_dict") and hasattr(p, "load_state_dict")
        ]
        if stateful:
            raise ValueError(f"The {kind} is stateful ({stateful[0]}): another pass would move it on. {way_out}")
        spent = [type(p).__name__ for p in (loader, *parts) if isinstance(p, Iterator)]
        if spent:
            raise ValueError(f"The {kind}'s {spent[0]} is an iterator: a pass would use it up. {way_out}")
        if isinstance(loader, DataLoader) and not _has_default_iter(loader):
            raise ValueError(
                f"The {kind} {name} has an __iter__ of its own, which may touch its live iterator. {way_out}"
            )
        if not isinstance(loader, (DataLoader, Sequence)):
            raise ValueError(f"The {kind} is a {name}, which we do not know how to iterate neutrally. {way_out}")


class _FreshIterator:
    """A loader whose every iteration is a new one: ``iter()`` would reset the live one of persistent workers."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        if not _has_default_iter(self.loader):
            return iter(self.loader)
        iterator: Iterator[Any] = self.loader._get_iterator()
        return iterator

    def __len__(self) -> int:
        return len(self.loader)


def _has_default_iter(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__


@contextmanager
def _preserve_loader_state(loaders: Sequence[Any]) -> Iterator[None]:
    """Give samplers, datasets and collate functions their counters, orders and random numbers back on leaving.

    Meanwhile they have copies of their lists, which may be orders that they shuffle in place; samplers also of their
    arrays. A dataset's arrays are its data, and too large to copy.
    """
    parts = ("generator", "sampler", "dataset", "collate_fn")
    noted = [unwrap_batch_sampler(loader) for loader in loaders]
    owners = find_stateful_objects(
        [*(getattr(loader, part, None) for loader in loaders for part in parts), *(sampler for sampler, _ in noted)]
    )
    data = {id(getattr(loader, "dataset", None)) for loader in loaders}
    restore = [snapshot_state(o) for o in (*owners, *(wrapper for _, wrapper in noted if wrapper is not None))]
    try:
        for o in owners:
            kinds = (*CONTAINERS, Tensor, np.ndarray) if isinstance(o, Sampler) else CONTAINERS
            own = vars(o) if hasattr(o, "__dict__") else {}
            own.update({k: copy.copy(v) for k, v in own.items() if isinstance(v, kinds) and id(v) not in data})
        yield
    finally:
        for give_back in restore:
            give_back()
