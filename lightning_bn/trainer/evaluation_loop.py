"""The evaluation loop that runs now, of a validation, a test or a prediction: its stage, its loaders, its step.

Behind the private fields of `trainer._active_loop` (Lightning 2.5 to 2.6).
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call

from lightning_bn.trainer.domains import domains_of

_STEP_CONTEXTS = {
    "validation": "val_step_context",
    "test": "test_step_context",
    "predict": "predict_step_context",
}


def stage_of(trainer: Trainer) -> str:
    """``"validation"``, ``"test"`` or ``"predict"``, as in the names of hooks.

    Raises:
        RuntimeError: While nothing is evaluated.
    """
    if trainer.testing or trainer.predicting:
        return "test" if trainer.testing else "predict"
    if trainer.validating or trainer.sanity_checking:
        return "validation"
    raise RuntimeError(f"The Trainer evaluates nothing at the moment: it is in stage {trainer.state.stage}.")


def num_domains(trainer: Trainer) -> int:
    """Dataloaders that are read one after the other; those that are read side by side count as one."""
    loader: Any = trainer._active_loop._combined_loader  # type: ignore[union-attr]
    return len(loader.flattened) if loader._mode == "sequential" else 1


def has_batches(trainer: Trainer, dataloader_idx: int) -> bool:
    """Whether this rank may get batches from a dataloader; of a stream that is empty nobody knows."""
    loop: Any = trainer._active_loop
    return bool(loop.max_batches[dataloader_idx] > 0)


def hook_arguments(trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int) -> dict[str, Any]:
    """What the loop gives to the hooks of a batch."""
    loop: Any = trainer._active_loop
    built = loop._build_kwargs(batch, batch_idx, dataloader_idx if num_domains(trainer) > 1 else None)
    return dict(built)


def run_hook(trainer: Trainer, module: LightningModule, name: str, *args: Any) -> Any:
    """Call a hook of the module as the loop does: `self.log` knows what it is called from."""
    return call._call_lightning_module_hook(trainer, name, *args, pl_module=module)


def run_step(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
    """Run the module's step as the loop does, but on the module itself: DDP's wrapper would wait for other ranks."""
    stage, loop = stage_of(trainer), trainer._active_loop
    name = f"{stage}_step"
    arguments: Any = hook_arguments(trainer, batch, batch_idx, dataloader_idx)
    with getattr(trainer.precision_plugin, _STEP_CONTEXTS[stage])(), domains_of(trainer, batch, dataloader_idx):
        return run_hook(trainer, module, name, *loop._build_step_args_from_hook_kwargs(arguments, name))  # type: ignore[union-attr]
