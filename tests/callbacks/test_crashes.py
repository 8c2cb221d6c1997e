"""A training that is killed resumes from its last checkpoint as if it had not been killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bn import FreezeBNCallback, PassConfig, PreciseBNCallback
from tests.callbacks.zoo import At, TinyNet, digest, equal_batches, fit
from tests.ranks import run_on_ranks


def kill(trainer: Trainer, *_: Any) -> None:
    """Kill -9, right before the batch after the fifth optimizer step."""
    if trainer.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, killed: bool = False, **kwargs: Any) -> Any:
    """Two epochs of four equal batches: PreciseBN, then frozen from step 6; a checkpoint per epoch."""
    module = TinyNet()
    ours = [PreciseBNCallback(20), FreezeBNCallback(start_step=6, precise=PassConfig(20), warmup_epochs=0.5)]
    others = [ModelCheckpoint(folder, "{step}", save_top_k=-1), *([At(kill, "on_train_batch_start")] if killed else [])]
    fit(module, [*ours, *others], equal_batches(), **kwargs)
    return digest(module.state_dict()), digest([c.state_dict() for c in ours])


def test_a_killed_training_resumes_as_the_uninterrupted_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0: died"):
        run_on_ranks(train, 1, tmp_path / "killed", True)
    assert train(tmp_path / "resumed", ckpt_path=tmp_path / "killed" / "step=4.ckpt") == train(tmp_path / "whole")
