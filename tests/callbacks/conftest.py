"""No test of callbacks may reach the next one. The modules and data they train are in `tests.callbacks.zoo`."""

import multiprocessing
from collections.abc import Iterator

import pytest

from tests import ranks


@pytest.fixture(autouse=True)
def _no_workers_left() -> Iterator[None]:
    """A pass over a loader with workers must end its workers."""
    before = set(multiprocessing.active_children())
    yield
    for process in set(multiprocessing.active_children()) - before - ranks.processes():
        process.join(5)
        assert not process.is_alive(), f"{process} still runs after the test"
