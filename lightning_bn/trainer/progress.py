"""A pass in the Trainer's own progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_bn.functional.measure import Progress


def progress_of(trainer: Trainer, name: str = "PreciseBN") -> Progress:
    """A display that adds a line to the Trainer's bar while a pass runs; nothing where there is no bar."""

    @contextmanager
    def show(total: int | None) -> Iterator[Callable[[int], None]]:
        bar: Any = trainer.progress_bar_callback
        kind = {c.__name__ for c in type(bar).__mro__}  # by name: pytorch_lightning has bars of its own
        if "TQDMProgressBar" in kind and bar.is_enabled:
            with Tqdm(desc=name, total=total, unit="sample", position=2, leave=False, dynamic_ncols=True) as line:

                def advance(samples: int) -> None:
                    line.update(samples)

                yield advance
        elif "RichProgressBar" in kind and bar.is_enabled and bar.progress is not None:
            progress, task = bar.progress, bar._add_task(total or 0, name)
            try:
                yield lambda samples: progress.advance(task, samples)
            finally:
                progress.remove_task(task)
        else:
            yield lambda samples: None

    return show
