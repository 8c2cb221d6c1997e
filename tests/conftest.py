"""What every test gets: one thread, a seed."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, database=None)  # the same examples, on any machine
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)  # the suite runs on two cores, ranks of DDP tests included
    torch.manual_seed(0)
