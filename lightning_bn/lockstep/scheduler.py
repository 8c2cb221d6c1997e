"""Lockstep: functions that wait for each other wherever they need an answer that depends on all of them.

Each function is suspended when it arrives at a meeting point. When all have arrived at the same one, their answers are
computed together, and they go on. So a network can be shown many batches as if they were one: they wait for each other
at every BatchNorm layer, and nothing else in the network needs to know. Each layer is run once for every batch, so
the cost is *linear* in depth.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning_bn.core.rng import random_streams

if TYPE_CHECKING:
    from lightning_bn.lockstep.task import Suspended

P = TypeVar("P")
V = TypeVar("V")
A = TypeVar("A")
T = TypeVar("T")


class LockstepError(RuntimeError):
    """Functions cannot go in lockstep: they come to different points, or influence each other."""


class Lockstep(Generic[P, V, A]):
    """Runs functions that wait for each other.

    They run by turns in one thread, and each keeps the state of the thread as it was where it waits. The one that came
    last to a point is the first to leave it: what it works on is still in the cache.

    Args:
        answer: Called with a point and what the functions brought to it, in their order; returns each one's answer.
        own_random_numbers: Give each function a stream of torch's random numbers of its own, drawn from the global one
            and leaving that alone. Else they draw from that one as they go.
        advice: What to do if they cannot go in lockstep, for messages.

    Example:
        >>> def together(point, values):
        ...     return [f"{v} of {sum(values)}" for v in values]
        >>> lockstep = Lockstep(together)
        >>> lockstep.run([lambda: lockstep.exchange("bn", 1), lambda: lockstep.exchange("bn", 2)])
        ['1 of 3', '2 of 3']
    """

    def __init__(
        self, answer: Callable[[P, list[V]], Sequence[A]], own_random_numbers: bool = False, advice: str = ""
    ) -> None:
        from lightning_bn.lockstep.task import Suspended  # of greenlet, which nothing else needs

        self._suspended: type[Suspended[P, V, A, Any]] = Suspended
        self._answer = answer
        self._own_random_numbers, self._advice = own_random_numbers, advice

    def exchange(self, point: P, value: V) -> A:
        """Wait, inside a function, until all others have come to ``point``, and get one's own answer."""
        own = self._suspended.running()
        if own is None:
            raise LockstepError(
                f"{point} was reached outside of the functions in lockstep, or in another thread. {self._advice}"
            )
        return own.exchange(point, value)

    def run(self, functions: Iterable[Callable[[], T]]) -> list[T]:
        """Run functions to their end, and return what they return.

        Raises:
            LockstepError: If some come to another point than others, or end where others wait; an error in one of them
                is raised as it is. All are unwound then: their ``finally`` clauses have run.
        """
        running: list[Suspended[P, V, A, T]] = []
        streams = random_streams() if self._own_random_numbers else itertools.repeat(None)
        with _filters_kept(), self._unwinding(running):
            for function in functions:
                running.append(self._suspended(function, next(streams)))
                running[-1].go_on()
            last_first = running
            while any(not s.dead for s in running):
                self._check(running)
                answers = self._answer(running[0].point, [s.value for s in running])
                for s, answer in zip(running, answers, strict=True):
                    s.answer = answer
                last_first = last_first[::-1]
                for s in last_first:
                    s.go_on()
            return [s.result for s in running]

    @staticmethod
    @contextmanager
    def _unwinding(running: Sequence[Suspended[P, V, A, T]]) -> Iterator[None]:
        try:
            yield
        finally:
            for s in running:
                s.unwind()

    def _check(self, running: Sequence[Suspended[P, V, A, T]]) -> None:
        first = running[0]
        for number, other in enumerate(running):
            if other.dead != first.dead or (not first.dead and other.point != first.point):
                raise LockstepError(
                    f"They diverge: number 1 {first.whereabouts()} when number {number + 1} {other.whereabouts()}. "
                    f"{self._advice}"
                )


@contextmanager
def _filters_kept() -> Iterator[None]:
    """Of warnings: `catch_warnings` that are left in another order than they were entered leave their filters behind.

    It is not done by one more of them, which would make Python forget what it has shown already.
    """
    filters: Any = warnings.filters
    held = filters[:]
    shows = {name: getattr(warnings, name) for name in ("showwarning", "_showwarnmsg_impl") if hasattr(warnings, name)}
    try:
        yield
    finally:
        if warnings.filters is not filters or filters[:] != held:
            warnings.filters = filters
            filters[:] = held
        for name, show in shows.items():
            setattr(warnings, name, show)
