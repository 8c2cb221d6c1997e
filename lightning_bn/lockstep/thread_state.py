"""State that torch keeps per thread, saved and restored for functions that run by turns in one thread.

Otherwise a function that waits inside ``torch.autocast`` would leave it on for all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._C import _autograd
from torch.utils import _device, _python_dispatch

_C: Any = torch._C  # the stacks of modes and hooks have no public functions

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # getter and setter


class ThreadState:
    """Keeps the thread's state at construction, and later the state at the end of the last `activate` block.

    It includes settings of the whole process with context managers: the default device and dtype, cuDNN's flags.
    The *cache* of autocast is shared, as it holds casts of shared weights.

    Example:
        >>> import torch
        >>> with torch.no_grad():
        ...     inside = ThreadState()
        >>> with inside.activate():
        ...     torch.is_grad_enabled()
        False
        >>> torch.is_grad_enabled()
        True
    """

    def __init__(self) -> None:
        self._own = _Snapshot.now()

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Switch the thread to this state, and back on leaving."""
        before = _Snapshot.now()
        # inference mode has no setter; leaving restores the value at entering
        with torch.inference_mode(self._own.inference):
            self._own.replace(before)
            try:
                yield
            finally:
                self._own = _Snapshot.now()
                before.replace(self._own)


class _Snapshot(NamedTuple):
    inference: bool
    grad: bool
    settings: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]
    function_modes: tuple[Any, ...]
    saved_tensor_hooks: tuple[tuple[Any, Any], ...]
    stream: torch.cuda.Stream | None

    @classmethod
    def now(cls) -> _Snapshot:
        return cls(
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            tuple(get() for get, _ in _SETTINGS),
            _listed(_C._len_torch_dispatch_stack(), _C._get_dispatch_stack_at),
            _listed(_C._len_torch_function_stack(), _C._get_function_stack_at),
            _saved_tensor_hooks(),
            torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
        )

    def replace(self, other: _Snapshot) -> None:  # switches the thread from `other` to this state
        dispatch, function, hooks = (
            (lambda: _C._pop_torch_dispatch_stack(None), _C._push_on_torch_dispatch_stack),
            (_C._pop_torch_function_stack, _C._push_on_torch_function_stack),
            (
                _autograd._pop_saved_tensors_default_hooks,
                lambda pair: _autograd._push_saved_tensors_default_hooks(*pair),
            ),
        )
        _replace_stack(self.dispatch_modes, other.dispatch_modes, *dispatch)
        _replace_stack(self.saved_tensor_hooks, other.saved_tensor_hooks, *hooks)
        _replace_stack((), other.function_modes, *function)  # they would intercept some of these setters
        _C._set_grad_enabled(self.grad)  # always: changing inference mode changes it
        for (_, set_to), wanted, found in zip(_SETTINGS, self.settings, other.settings, strict=True):
            if wanted != found:
                set_to(wanted)
        _replace_stack(self.function_modes, (), *function)
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)  # and its device


def _listed(length: int, at: Callable[[int], Any]) -> tuple[Any, ...]:
    return tuple(at(i) for i in range(length)) if length else ()


def _saved_tensor_hooks() -> tuple[tuple[Any, Any], ...]:  # only the top of the stack can be read
    found: list[tuple[Any, Any]] = []
    while (top := _autograd._top_saved_tensors_default_hooks(False)) is not None:
        found.insert(0, top)
        _autograd._pop_saved_tensors_default_hooks()
    for hooks in found:
        _autograd._push_saved_tensors_default_hooks(*hooks)
    return tuple(found)


def _replace_stack(
    wanted: tuple[Any, ...], held: tuple[Any, ...], pop: Callable[[], Any], push: Callable[[Any], Any]
) -> None:
    if wanted != held:
        for _ in held:
            pop()
        for item in wanted:
            push(item)


def _autocast(kind: str) -> list[Setting]:
    return [
        (functools.partial(torch.is_autocast_enabled, kind), functools.partial(torch.set_autocast_enabled, kind)),
        (functools.partial(torch.get_autocast_dtype, kind), functools.partial(torch.set_autocast_dtype, kind)),
    ]


# flags of active dispatch modes, kept for torch.compile; their names differ between versions
_IN_A_MODE = [name for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_") and value in (0, 1)]


def _set_in_a_mode(values: tuple[bool, ...]) -> None:
    for name, value in zip(_IN_A_MODE, values, strict=True):
        setattr(_python_dispatch, name, value)
        if setter := getattr(_python_dispatch, f"set{name.replace('_any_mode', '_mode')}", None):
            setter(value)


_SETTINGS: list[Setting] = [
    (lambda: tuple(getattr(_python_dispatch, name) for name in _IN_A_MODE), _set_in_a_mode),
    *_autocast("cpu"),
    *_autocast("cuda"),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (_C._get_torch_function_state, _C._set_torch_function_state),
    (torch.get_default_dtype, torch.set_default_dtype),
    (lambda: _device.CURRENT_DEVICE, functools.partial(setattr, _device, "CURRENT_DEVICE")),
    (_C._get_cudnn_enabled, _C._set_cudnn_enabled),
    (_C._get_cudnn_benchmark, _C._set_cudnn_benchmark),
    (_C._get_cudnn_deterministic, _C._set_cudnn_deterministic),
]
