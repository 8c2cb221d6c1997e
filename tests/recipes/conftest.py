"""W&B without a network for all tests of recipes."""

from collections.abc import Iterator

import pytest
import torch
import wandb


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)  # as in every test, but before module-scoped fixtures run recipes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("staging")))
        yield
        wandb.finish()
        wandb.teardown()
