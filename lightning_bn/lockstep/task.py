"""Functions that can be suspended, each with its own thread state: greenlets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from typing import Generic, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from lightning_bn.core.rng import RandomStream
from lightning_bn.lockstep.thread_state import ThreadState

P = TypeVar("P")
V = TypeVar("V")
A = TypeVar("A")
T = TypeVar("T")


class Task(greenlet, Generic[P, V, A, T]):
    """Runs a function until it waits at its next point, where it calls `exchange`."""

    point: P
    value: V
    answer: A | None = None
    result: T

    def __init__(self, function: Callable[[], T], random: RandomStream | None) -> None:
        super().__init__(function)
        self.gr_context = copy_context()
        self._state, self._random = ThreadState(), random

    @staticmethod
    def running() -> Task[P, V, A, T] | None:
        """Return the task whose function calls this."""
        current = getcurrent()
        return current if isinstance(current, Task) else None

    def exchange(self, point: P, value: V) -> A:
        """Wait, inside the function, at a point with a value; return the answer."""
        assert self.parent is not None  # in which `resume` was called
        answer: A = self.parent.switch((point, value))
        return answer

    def resume(self) -> None:
        """Run to the next point, or to the end."""
        with self._own_state():
            returned = self.switch(self.answer) if self else self.switch()
        self.answer = None
        if self.dead:
            self.result = returned
        else:
            self.point, self.value = returned

    def unwind(self) -> None:
        """End the function where it waits, and suppress its errors, because an earlier one is the cause."""
        while self and not self.dead:
            with self._own_state(), suppress(BaseException):
                self.throw(GreenletExit)

    @contextmanager
    def _own_state(self) -> Iterator[None]:
        with self._state.activate(), self._random.activate() if self._random else nullcontext():
            yield

    def position(self) -> str:
        return "had ended" if self.dead else f"was at {self.point}"
