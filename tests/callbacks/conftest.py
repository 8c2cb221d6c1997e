"""No test of callbacks may reach the next one. The modules and data they train are in `tests.callbacks.zoo`."""

import multiprocessing
import signal
from collections.abc import Iterator

import pytest

from tests import ranks


@pytest.fixture(autouse=True)
def _no_workers_left() -> Iterator[None]:
    """A pass over a loader with workers must end its workers; Ctrl-C, which Lightning ignores once pressed, works."""
    before, on_interrupt = set(multiprocessing.active_children()), signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, on_interrupt)
    for process in set(multiprocessing.active_children()) - before - ranks.processes():
        process.join(5)
        assert not process.is_alive(), f"{process} still runs after the test"
