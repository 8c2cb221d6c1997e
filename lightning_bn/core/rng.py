"""Random states: the one place that saves, restores and separates them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Generators that `save_generator` can save."""


def save_rng_state(cuda: bool = True) -> Callable[[], None]:
    """Save the states of Python, NumPy, torch and, with ``cuda``, CUDA devices; return a function to restore them."""
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)

    return restore


@contextmanager
def preserve_rng_state(cuda: bool = True) -> Iterator[None]:
    """Restore the global random states on leaving."""
    restore = save_rng_state(cuda)
    try:
        yield
    finally:
        restore()


def save_generator(generator: Any) -> Callable[[], Any]:
    """Save the state of one of `GENERATORS`; return a function that restores it."""
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


class RandomStream:
    """Draws torch's random numbers, on the CPU and on CUDA, from its own state, which continues where it stopped."""

    def __init__(self, seed: int) -> None:
        on_cuda = [torch.Generator("cuda")] if torch.cuda.is_initialized() else []
        self._states = [generator.manual_seed(seed).get_state() for generator in (torch.Generator(), *on_cuda)]

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Draw from this stream within the block, and from the global one again after it."""
        devices = (torch.random, torch.cuda)[: len(self._states)]
        before = [device.get_rng_state() for device in devices]
        for device, state in zip(devices, self._states, strict=True):
            device.set_rng_state(state)
        try:
            yield
        finally:
            self._states = [device.get_rng_state() for device in devices]
            for device, state in zip(devices, before, strict=True):
                device.set_rng_state(state)


def random_streams() -> Iterator[RandomStream]:
    """Yield streams that depend on the state of torch's global generator, and do not advance it."""
    seeds = random.Random(torch.get_rng_state().numpy().tobytes())
    while True:
        yield RandomStream(seeds.getrandbits(62))
