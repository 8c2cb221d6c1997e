"""Lockstep: functions wait for each other at every point that needs an answer from all of them.

When all functions have reached the same point, their answers are computed together, and they continue. So a network
processes many batches as one, and each batch passes each layer once: the cost is *linear* in depth.
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
    """Signals that batches cannot run in lockstep: they reach different layers, or influence each other."""


class Lockstep(Generic[P, V, A]):
    """Runs functions that wait for each other, by turns in one thread, each with its own thread state.

    ``answer(point, values)`` returns one answer per function. With ``own_random_numbers``, each function has its own
    stream of torch's random numbers, and the global one does not advance.

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
        """Wait, inside a function, until all others have reached ``point``; return this function's answer."""
        task = self._task.running()
        if task is None:
            raise LockstepError(
                f"{point} was reached outside of the functions in lockstep, or in another thread. {self._advice}"
            )
        return task.exchange(point, value)

    def run(self, functions: Iterable[Callable[[], T]]) -> list[T]:
        """Run functions to their end, and return their results.

        On an error, or if points differ, all are unwound: their ``finally`` clauses have run.
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
                    order = order[::-1]  # the last one's data are still in cache
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
    # `catch_warnings` blocks of functions may end in another order than they began, and leave their filters. Another
    # `catch_warnings` around them would make Python forget which warnings it has issued.
    filters: Any = warnings.filters
    before = filters[:]
    hooks = {name: getattr(warnings, name) for name in ("showwarning", "_showwarnmsg_impl") if hasattr(warnings, name)}
    try:
        yield
    finally:
        if warnings.filters is not filters or filters[:] != before:
            warnings.filters = filters
            filters[:] = before
        for name, hook in hooks.items():
            setattr(warnings, name, hook)
