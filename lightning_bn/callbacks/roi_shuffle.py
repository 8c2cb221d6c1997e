"""RoI shuffle in training: exchange rows of a head among devices (paper, Sec. 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.base import FitScopedCallback
from lightning_bn.core.checks import check_int
from lightning_bn.functional.roi_shuffle import Shuffle, roi_shuffle
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import as_patterns, find_bn, find_modules
from lightning_bn.trainer.compat import state_key


class RoIShuffleCallback(FitScopedCallback):
    """Exchange the rows that enter chosen modules at random among devices, during a fit (Sec. 6.1). See `roi_shuffle`.

    The output for a row returns to the row's device, with gradients. So only the batches that BatchNorm layers
    normalize over change. Evaluation, frozen layers and `PreciseBNCallback`'s passes exchange nothing.

    It helps heads that see many regions of few images (Table 3), and momentum encoders of contrastive learning.
    It does not help with one process or independent samples. `SyncBNCallback` is as accurate and sends less.
    Cost: rows that change devices cross the network twice in forward and twice in backward.

    Args:
        modules: Glob patterns over qualified module names, such as ``"roi_heads.box_head"`` or ``"encoder_k"``. Of
            nested matches the outermost counts.
        seed: Seed of the generator that draws the order of rows. Checkpoints contain its state.

    Attributes:
        unshuffled: Calls of modules in this fit, in train mode, that exchanged nothing: fewer than two rows per device.

    Raises:
        ValueError: At fit start, for a pattern without a match or a conflicting callback; in training, if rows differ
            between devices in dtype or shape.
        TypeError: In training, if a module takes or returns something that may hide rows.
        RuntimeError: At fit start, for a strategy that shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import RoIShuffleCallback
        >>> callback = RoIShuffleCallback(modules="roi_heads.box_head")
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    kind = "row shuffle"

    def __init__(self, modules: str | Sequence[str], *, seed: int = 0) -> None:
        super().__init__()
        as_patterns(modules, "modules")
        self.modules = modules
        check_int("seed", seed, at_least=0)
        if seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, the limit of torch.Generator, but is {seed}.")
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._unshuffled_before = 0

    @property
    def state_key(self) -> str:
        return state_key(self, modules=as_patterns(self.modules, "modules"))

    @property
    def unshuffled(self) -> int:
        return self._unshuffled_before + (self._handle.unshuffled if isinstance(self._handle, Shuffle) else 0)

    def chosen_layers(self, module: LightningModule) -> dict[str, _BatchNorm]:
        inside = {id(m) for outer in find_modules(module, self.modules).values() for m in outer.modules()}
        return {name: layer for name, layer in find_bn(module).items() if id(layer) in inside}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # a checkpoint is loaded after this
            self._generator.manual_seed(self.seed)
            self._unshuffled_before = 0

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "unshuffled": self.unshuffled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generator.set_state(state_dict["generator"])
        self._unshuffled_before = state_dict["unshuffled"]

    def __getstate__(self) -> dict[str, Any]:
        # as bytes: spawned processes cannot open the shared memory in which torch would pickle a tensor
        return {**super().__getstate__(), "_generator": bytes(self._generator.get_state().tolist())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(torch.tensor(list(state["_generator"]), dtype=torch.uint8))
        self.__dict__.update(state, _generator=generator)

    def _attach(self, module: LightningModule) -> Handle:
        return roi_shuffle(module, modules=self.modules, generator=self._generator)

    def _detach(self) -> None:
        self._unshuffled_before = self.unshuffled
        super()._detach()
