"""A function that can be suspended in its middle, with the state of the thread that it has there: a greenlet."""

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


class Suspended(greenlet, Generic[P, V, A, T]):
    """A function that is run as far as its next meeting point.

    Args:
        function: It calls `exchange` at a meeting point.
        random: A stream of random numbers of its own.
    """

    point: P
    value: V
    answer: A | None = None
    result: T

    def __init__(self, function: Callable[[], T], random: RandomStream | None) -> None:
        super().__init__(function)
        self.gr_context = copy_context()
        self._state, self._random = ThreadState(), random

    @staticmethod
    def running() -> Suspended[P, V, A, T] | None:
        """The one whose function this is called in."""
        own = getcurrent()
        return own if isinstance(own, Suspended) else None

    def exchange(self, point: P, value: V) -> A:
        """Wait, inside the function, at a point to which it brings a value; return the answer."""
        assert self.parent is not None  # in which `go_on` was called
        answer: A = self.parent.switch((point, value))
        return answer

    def go_on(self) -> None:
        """Run to the next point, or to the end."""
        with self._own_state():
            came_back = self.switch(self.answer) if self else self.switch()
        self.answer = None
        if self.dead:
            self.result = came_back
        else:
            self.point, self.value = came_back

    def unwind(self) -> None:
        """End the function where it waits, whatever it makes of that: there is an error already, why it is ended."""
        while self and not self.dead:
            with self._own_state(), suppress(BaseException):
                self.throw(GreenletExit)

    @contextmanager
    def _own_state(self) -> Iterator[None]:
        with self._state.activate(), self._random.activate() if self._random else nullcontext():
            yield

    def whereabouts(self) -> str:
        """Where it is, for messages."""
        return "had come to its end" if self.dead else f"was at {self.point}"
