"""Lockstep: functions wait for each other wherever they need an answer that depends on all of them.

A function is suspended when it reaches a point. When all have reached the same one, their answers are computed
together, and they continue. So a network can process many batches as if they were one: they wait for each other at
every BatchNorm layer. Each batch passes each layer once, so the cost is *linear* in depth.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning_bn.core.rng import random_streams

if TYPE_CHECKING:
    from lightning_bn.lockstep.task import Task

P = TypeVar("P")
V = TypeVar("V")
A = TypeVar("A")
T = TypeVar("T")


class LockstepError(RuntimeError):
    """Functions cannot run in lockstep: they reach different points, or influence each other."""


class Lockstep(Generic[P, V, A]):
    """Runs functions that wait for each other.

    They run by turns in one thread, and each keeps its own thread state. They resume in reverse order, because the
    last one's data are still in cache.

    Args:
        answer: Called with a point and the functions' values, in their order; returns each one's answer.
        own_random_numbers: Give each function its own stream of torch's random numbers, which depends on the state of
            the global one and does not advance it.
        advice: What to do if they cannot run in lockstep, for messages.

    Example:
        >>> def pool(point, values):
        ...     return [f"{v} of {sum(values)}" for v in values]
        >>> lockstep = Lockstep(pool)
        >>> lockstep.run([lambda: lockstep.exchange("bn", 1), lambda: lockstep.exchange("bn", 2)])
        ['1 of 3', '2 of 3']
    """

    def __init__(
        self, answer: Callable[[P, list[V]], Sequence[A]], own_random_numbers: bool = False, advice: str = ""
    ) -> None:
        from lightning_bn.lockstep.task import Task  # imports greenlet, which nothing else needs

        self._task: type[Task[P, V, A, Any]] = Task
        self._answer = answer
        self._own_random_numbers, self._advice = own_random_numbers, advice

    def exchange(self, point: P, value: V) -> A:
        """Wait, inside a function, until all others have reached ``point``; returns this function's answer."""
        task = self._task.running()
        if task is None:
            raise LockstepError(
                f"{point} was reached outside of the functions in lockstep, or in another thread. {self._advice}"
            )
        return task.exchange(point, value)

    def run(self, functions: Iterable[Callable[[], T]]) -> list[T]:
        """Run functions to their end; returns their results.

        Raises:
            LockstepError: If some reach another point than others, or end where others wait. An error in a function is
                raised as it is. All are unwound then: their ``finally`` clauses have run.
        """
        tasks: list[Task[P, V, A, T]] = []
        streams = random_streams() if self._own_random_numbers else itertools.repeat(None)
        with _preserve_warning_filters():
            try:
                for function in functions:
                    tasks.append(self._task(function, next(streams)))
                    tasks[-1].resume()
                order = tasks
                while any(not task.dead for task in tasks):
                    self._check_same_point(tasks)
                    answers = self._answer(tasks[0].point, [task.value for task in tasks])
                    for task, answer in zip(tasks, answers, strict=True):
                        task.answer = answer
                    order = order[::-1]
                    for task in order:
                        task.resume()
                return [task.result for task in tasks]
            finally:
                for task in tasks:
                    task.unwind()

    def _check_same_point(self, tasks: Sequence[Task[P, V, A, T]]) -> None:
        first = tasks[0]
        for number, other in enumerate(tasks):
            if other.dead != first.dead or (not first.dead and other.point != first.point):
                raise LockstepError(
                    f"They diverge: number 1 {first.position()} when number {number + 1} {other.position()}. "
                    f"{self._advice}"
                )


@contextmanager
def _preserve_warning_filters() -> Iterator[None]:
    """Restore the filters: `catch_warnings` blocks that end in another order than they began leave theirs behind.

    Another `catch_warnings` would do, but it makes Python forget which warnings it has shown.
    """
    filters: Any = warnings.filters
    before = filters[:]
    shows = {name: getattr(warnings, name) for name in ("showwarning", "_showwarnmsg_impl") if hasattr(warnings, name)}
    try:
        yield
    finally:
        if warnings.filters is not filters or filters[:] != before:
            warnings.filters = filters
            filters[:] = before
        for name, show in shows.items():
            setattr(warnings, name, show)
