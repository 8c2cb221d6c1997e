"""The output of a callback: rows and keys for loggers, and a line in the Trainer's progress bar."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_bn.functional.measure import Progress
from lightning_bn.trainer.compat import add_rich_task, log_step


def log_row(trainer: Trainer, row: Mapping[str, float]) -> None:
    """Log metrics under their full keys to every logger, in one row, at the step that `self.log` uses."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(row), step=log_step(trainer))


def safe_keys(names: Iterable[str]) -> dict[str, str]:
    """Return unique metric keys for layer names, of letters, digits and underscores: W&B takes a dot for a path.

    Example:
        >>> safe_keys(["layer1.0.bn1", "layer1.0_bn1"])
        {'layer1.0.bn1': 'layer1_0_bn1', 'layer1.0_bn1': 'layer1_0_bn1_1'}
    """
    keys: dict[str, str] = {}
    for index, name in enumerate(names):
        key = re.sub(r"\W", "_", name)
        keys[name] = f"{key}_{index}" if key in keys.values() else key
    return keys


def progress_of(trainer: Trainer, name: str = "PreciseBN") -> Progress:
    """Return a display that adds a line to the Trainer's progress bar during a pass, if there is a bar."""

    @contextmanager
    def show(total: int | None) -> Iterator[Callable[[int], Any]]:
        bar: Any = trainer.progress_bar_callback
        kinds = {c.__name__ for c in type(bar).__mro__}  # by name: pytorch_lightning has its own classes
        if "TQDMProgressBar" in kinds and bar.is_enabled:
            with Tqdm(desc=name, total=total, unit="sample", position=2, leave=False, dynamic_ncols=True) as line:
                yield line.update
        elif "RichProgressBar" in kinds and bar.is_enabled and bar.progress is not None:
            progress, task = bar.progress, add_rich_task(bar, total or 0, name)
            try:
                yield lambda samples: progress.advance(task, samples)
            finally:
                progress.remove_task(task)
        else:
            yield lambda samples: None

    return show
