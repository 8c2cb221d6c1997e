"""A training that is killed resumes from its last checkpoint as if it had not been killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import ConcatDataset, DataLoader

from lightning_bn import FreezeBNCallback, PassConfig, PreciseBNCallback
from tests.callbacks.zoo import Images, TinyNet, digest, fit


class KilledAt(Callback):
    """kill -9, right before the training batch after ``step`` optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, *others: Callback, **kwargs: Any) -> tuple[TinyNet, list[Any]]:
    """Three epochs of four equal batches: PreciseBN, then frozen from step 10; a checkpoint per epoch."""
    torch.set_num_threads(1)  # as in the tests' process, for the same bits
    module = TinyNet()
    callbacks = [PreciseBNCallback(20), FreezeBNCallback(start_step=10, precise=PassConfig(20), warmup_epochs=0.5)]
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1)
    loader = DataLoader(ConcatDataset([Images(8)] * 4), 8)
    fit(module, [*callbacks, saving, *others], loader, max_epochs=3, **kwargs)
    return module, callbacks


def test_a_killed_training_resumes_as_the_uninterrupted_one(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=train, args=(tmp_path / "killed", KilledAt(9)))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    uninterrupted, whole = train(tmp_path / "whole")
    resumed, callbacks = train(tmp_path / "resumed", ckpt_path=tmp_path / "killed" / "step=8.ckpt")
    assert digest(resumed.state_dict()) == digest(uninterrupted.state_dict())
    assert digest([c.state_dict() for c in callbacks]) == digest([c.state_dict() for c in whole])
