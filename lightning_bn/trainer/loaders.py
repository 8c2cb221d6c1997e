"""Batches for a pass: from fresh iterators over the Trainer's loaders, from the user's loader, or replayed."""

from __future__ import annotations

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
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

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
from lightning_bn.trainer.held_state import HeldState


@contextmanager
def train_batches(trainer: Trainer, module: LightningModule) -> Iterator[Iterator[Any]]:
    """Yield this rank's batches of the train dataloader, from a fresh iterator, on the device.

    Outside a fit they are those of the module or data module, sharded over ranks.
    """
    if trainer.state.fn != "fit":
        with loader_batches(trainer, module, own_train_dataloader(trainer, module), shard=True) as batches:
            yield batches
        return
    live = train_loaders(trainer)
    assert live is not None
    check_loader_reiterable(live.flattened)
    fresh = CombinedLoader(tree_map(_FreshIterator, live.iterables), combination_mode(live))
    with _preserve_loader_state(live.flattened):
        try:
            items = _limited(fresh, trainer.num_training_batches)
            yield (batch_to_device(trainer, module, batch) for batch, *_ in items)
        finally:
            fresh.reset()  # ends the workers


@contextmanager
def evaluation_batches(
    trainer: Trainer, module: LightningModule, dataloader_idx: int | None = None
) -> Iterator[Iterator[tuple[Any, int, int]]]:
    """Yield this rank's batches of the evaluated loaders, or of one of them, from fresh iterators, on the device.

    Each is a tuple of batch, index of the batch, and index of the loader; the latter is 0 for combined loaders.
    """
    live = evaluation_loaders(trainer)
    sequential = combination_mode(live) == "sequential"
    check_loader_reiterable(
        live.flattened,
        "evaluated dataloader",
        "Give the Trainer a plain DataLoader or, with AdaBN, pass online=True, log_unadapted=False.",
    )
    loaders: Any = tree_map(_FreshIterator, live.iterables)
    if dataloader_idx is not None and sequential:
        # empty lists for the others, which then start no workers
        loaders = [_FreshIterator(loader if i == dataloader_idx else []) for i, loader in enumerate(live.flattened)]
    fresh = CombinedLoader(loaders, combination_mode(live))
    fresh.limits = limits = evaluation_loop(trainer).max_batches

    def on_device() -> Iterator[tuple[Any, int, int]]:
        # A generator, so that reading starts within the reader's isolation: it draws random numbers.
        for batch, batch_idx, index in _limited(fresh, sum(limits) if sequential else max(limits)):
            yield batch_to_device(trainer, module, batch, index), batch_idx, index

    with _preserve_loader_state(live.flattened):
        try:
            yield on_device()
        finally:
            fresh.reset()  # ends the workers


@contextmanager
def loader_batches(
    trainer: Trainer, module: LightningModule, loader: Iterable[Any], shard: bool
) -> Iterator[Iterator[Any]]:
    """Yield this rank's batches of a loader of the user, on the device; with ``shard``, every n-th batch."""
    ranks = get_world_size() if shard else 1
    if ranks > 1:  # all ranks must shuffle alike
        seed, *_ = sum_over_ranks([random.getrandbits(31) if get_rank() == 0 else 0], module.device)
        for seed_generator in (random.seed, np.random.seed, torch.manual_seed):
            seed_generator(seed)
    if isinstance(loader, Mapping):  # combined as by Lightning
        combined = CombinedLoader(tree_map(_FreshIterator, loader), "max_size_cycle")
        loader = (batch for batch, *_ in combined)
    with _preserve_loader_state([loader]):
        shard_of_rank = itertools.islice(_FreshIterator(loader), get_rank() if ranks > 1 else 0, None, ranks)
        yield (batch_to_device(trainer, module, batch) for batch in shard_of_rank)


def own_train_dataloader(trainer: Trainer, module: LightningModule) -> Iterable[Any]:
    """Return the train dataloader that a data module or module defines, outside a fit."""
    assert trainer.state.fn is not None
    verb = trainer.state.fn.value
    for owner in (getattr(trainer, "datamodule", None), module):
        # Lightning's is_overridden does not know pytorch_lightning's modules
        if owner is not None and not owner.train_dataloader.__qualname__.startswith("DataHooks."):
            try:
                loader: Iterable[Any] = owner.train_dataloader()
            except AttributeError as error:
                raise ValueError(
                    f"{type(owner).__name__}.train_dataloader fails under trainer.{verb}, because its setup created no "
                    f"training data ({error}): create them in setup for every stage, or pass "
                    "source=FromLoader(fn), with a function from the Trainer to a loader."
                ) from error
            return loader
    raise ValueError(
        f"trainer.{verb} has no training data to recompute population statistics from: define "
        "train_dataloader in the LightningModule or DataModule, or pass source=FromLoader(fn), with a function "
        "from the Trainer to a loader."
    )


class ReplayBuffer:
    """Holds the last training batches of this rank, ``num_samples`` or slightly more, on the CPU."""

    def __init__(self, num_samples: int, max_bytes: int) -> None:
        self.num_samples = num_samples
        self.max_bytes = max_bytes
        self._batches: deque[tuple[HostCopy, int]] = deque()

    @property
    def held(self) -> int:
        """Count the samples held now."""
        return sum(samples for _, samples in self._batches)

    def keep(self, batch: Any, samples: int) -> None:
        """Copy a batch, before the training step can change it; drop the oldest ones that are not needed."""
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
        """Return copies of the batches, newest first, on their original devices."""
        return (kept.batch() for kept, _ in reversed(self._batches))


def check_loader_reiterable(
    loaders: Sequence[Any],
    kind: str = "train dataloader",
    alternative: str = "Use source='replay', or source=FromLoader(fn) with a function from the Trainer to a loader.",
) -> None:
    """Raise ValueError for a loader that cannot be read a second time while it is being read."""
    for loader in loaders:
        name = type(loader).__name__
        parts = [getattr(loader, "sampler", None), unwrap_batch_sampler(loader)[0], getattr(loader, "dataset", None)]
        for part in (loader, *parts):
            if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
                raise ValueError(
                    f"The {kind} is stateful ({type(part).__name__}): another pass would advance it. {alternative}"
                )
            if isinstance(part, Iterator):
                raise ValueError(
                    f"The {kind}'s {type(part).__name__} is an iterator: a pass would use it up. {alternative}"
                )
        if isinstance(loader, DataLoader) and not _has_default_iter(loader):
            raise ValueError(f"The {kind} {name} overrides __iter__, which may change its live iterator. {alternative}")
        if not isinstance(loader, (DataLoader, Sequence)):
            raise ValueError(f"The {kind} is a {name}, which may not be iterable without side effects. {alternative}")


class _FreshIterator:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        # With persistent workers `iter(loader)` would reset the live iterator.
        if not _has_default_iter(self.loader):
            return iter(self.loader)
        iterator: Iterator[Any] = self.loader._get_iterator()  # private in torch, and what its __iter__ calls
        return iterator

    def __len__(self) -> int:
        return len(self.loader)


def _limited(loader: CombinedLoader, limit: float) -> Iterator[Any]:
    # A CombinedLoader does not keep to its own limits in every mode.
    return itertools.islice(loader, None if limit == float("inf") else int(limit))


def _has_default_iter(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__


@contextmanager
def _preserve_loader_state(loaders: Sequence[Any]) -> Iterator[None]:
    samplers = [getattr(loader, "sampler", None) for loader in loaders]
    samplers += [sampler for loader in loaders for sampler in unwrap_batch_sampler(loader)]
    parts = [getattr(loader, part, None) for loader in loaders for part in ("generator", "dataset", "collate_fn")]
    held = HeldState(samplers, parts)
    try:
        yield
    finally:
        held.restore()
