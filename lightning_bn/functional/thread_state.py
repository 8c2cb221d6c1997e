"""What torch keeps for each thread, taken away from one function and given to the next.

Functions that run by turns in one thread would leak into each other: one that waits inside ``torch.autocast`` would
leave it on for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import _autograd
from torch.utils import _python_dispatch  # noqa: F401  # makes the dispatch stack's functions usable

_C: Any = torch._C
"""The stacks of modes and hooks have no public way in."""


@dataclass(frozen=True)
class ThreadState:
    """Grad and inference mode, autocast, modes, saved-tensor hooks, CUDA's device and stream; and the default dtype.

    The latter is the whole process's, but half-precision training changes it around every step, as if it were not.
    The *cache* of autocast is shared: it holds casts of weights, which are everybody's, until the last one has left.

    Example:
        >>> import torch
        >>> with torch.no_grad():
        ...     inside = ThreadState.now()
        >>> with inside.entered():
        ...     torch.is_grad_enabled()
        False
        >>> torch.is_grad_enabled()
        True
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    default_dtype: torch.dtype
    functions_seen: Any
    function_modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]
    saved_tensor_hooks: tuple[tuple[Any, Any], ...]
    stream: torch.cuda.Stream | None

    @classmethod
    def now(cls) -> ThreadState:
        """That of this thread at the moment."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            _C._get_torch_function_state(),
            _listed(_C._len_torch_function_stack(), _C._get_function_stack_at),
            _listed(_C._len_torch_dispatch_stack(), _C._get_dispatch_stack_at),
            _saved_tensor_hooks(),
            torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Give the thread this state, and on leaving the one that it had."""
        before = ThreadState.now()
        # Inference mode has no plain setter. Leaving sets what entering found, wherever the thread has gone between.
        with torch.inference_mode(self.inference):
            self._set()
            try:
                yield
            finally:
                before._set()

    def _set(self) -> None:
        _refill(
            self.dispatch_modes,
            _listed(_C._len_torch_dispatch_stack(), _C._get_dispatch_stack_at),
            _C._pop_torch_dispatch_stack,
            _C._push_on_torch_dispatch_stack,
        )
        _refill(
            self.function_modes,
            _listed(_C._len_torch_function_stack(), _C._get_function_stack_at),
            _C._pop_torch_function_stack,
            _C._push_on_torch_function_stack,
        )
        _refill(
            self.saved_tensor_hooks,
            _saved_tensor_hooks(),
            _autograd._pop_saved_tensors_default_hooks,
            lambda hooks: _autograd._push_saved_tensors_default_hooks(*hooks),
        )
        _C._set_torch_function_state(self.functions_seen)
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.set_default_dtype(self.default_dtype)
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)  # and its device


class RandomState:
    """A stream of torch's random numbers, on the CPU and on CUDA, that goes on where it was left.

    Args:
        seed: Where it starts.
    """

    def __init__(self, seed: int) -> None:
        on_cuda = [torch.Generator("cuda")] if torch.cuda.is_initialized() else []
        self._states = [generator.manual_seed(seed).get_state() for generator in (torch.Generator(), *on_cuda)]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Draw from this stream, and on leaving from the one before."""
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


def random_streams() -> Iterator[RandomState]:
    """Streams that depend on the state of the global one, and do not move it."""
    seeds = torch.Generator()
    seeds.set_state(torch.get_rng_state())
    while True:
        yield RandomState(int(torch.randint(2**62, (), generator=seeds)))


def _listed(length: int, at: Callable[[int], Any]) -> tuple[Any, ...]:
    return tuple(at(i) for i in range(length)) if length else ()


def _saved_tensor_hooks() -> tuple[tuple[Any, Any], ...]:
    """The whole stack, which can only be read from its top."""
    found: list[tuple[Any, Any]] = []
    while (top := _autograd._top_saved_tensors_default_hooks(False)) is not None:
        found.insert(0, top)
        _autograd._pop_saved_tensors_default_hooks()
    for hooks in found:
        _autograd._push_saved_tensors_default_hooks(*hooks)
    return tuple(found)


def _refill(wanted: tuple[Any, ...], held: tuple[Any, ...], pop: Callable[[], Any], push: Callable[[Any], Any]) -> None:
    if wanted != held:
        for _ in held:
            pop()
        for item in wanted:
            push(item)
