"""RoI shuffle in training: rows of a head are exchanged among devices (paper, Sec. 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.during_fit import FitScopedCallback
from lightning_bn.core.checks import check_int
from lightning_bn.functional.roi_shuffle import Shuffle, roi_shuffle
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import as_patterns, find_bn, find_modules
from lightning_bn.trainer.compat import state_key


class RoIShuffleCallback(FitScopedCallback):
    """Exchange the rows that enter chosen modules at random among devices, for the length of a fit (Sec. 6.1).

    What a module returns for a row goes back to the row's device, with gradients, so nothing but the batches that its
    BatchNorm layers normalize over is different. Evaluation, frozen layers and `PreciseBNCallback`'s passes exchange
    nothing. See `roi_shuffle`, which this is, also for what it asks of a training step.

    When it helps: heads that see many regions of few images (Mask R-CNN with BatchNorm in its heads, one image per
    device: box AP 30.7 without, 41.7 with; Table 3), and momentum encoders of contrastive learning (ShuffleBN:
    ``modules="encoder_k"``). When it does not: where samples are independent; and `SyncBNCallback` gives the same AP
    (41.7) for fewer bytes. With one process it does nothing, and warns: `GhostBNCallback` is what helps there.

    Cost: rows that change devices travel, into the modules and back, once in forward and once in backward.

    Args:
        modules: Glob patterns over qualified names of modules, such as ``"roi_heads.box_head"`` or, for a detector in
            the attribute ``model``, ``"model.roi_heads.box_head"``; of modules within each other the outermost counts.
        seed: Of the generator that draws the order of rows. Its state is in checkpoints.

    Attributes:
        unshuffled: Calls of modules in this fit, in train mode, whose rows stayed, because there were fewer than two a
            device.

    Raises:
        ValueError: At fit start, if a pattern matches nothing, a module is shuffled already, or a layer in it is under
            `SyncBNCallback`; in training, if rows differ between devices in dtype or shape.
        TypeError: In training, if a module is given or returns something in which rows could hide.
        RuntimeError: At fit start, for a strategy that shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import RoIShuffleCallback
        >>> callback = RoIShuffleCallback(modules="roi_heads.box_head")
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          devices: 8
          strategy: ddp
          callbacks:
            - class_path: lightning_bn.RoIShuffleCallback
              init_args: {modules: ["roi_heads.box_head", "roi_heads.mask_head"]}
        ```
    """

    kind = "row shuffle"

    def __init__(self, modules: str | Sequence[str], seed: int = 0) -> None:
        super().__init__()
        as_patterns(modules, "modules")
        self.modules = modules
        check_int("seed", seed, at_least=0)
        if seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, which torch.Generator takes, but is {seed}.")
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._before = 0

    @property
    def state_key(self) -> str:
        """Differs between callbacks on different modules: their states would overwrite each other."""
        return state_key(self, modules=as_patterns(self.modules, "modules"))

    @property
    def unshuffled(self) -> int:
        return self._before + (self._handle.unshuffled if isinstance(self._handle, Shuffle) else 0)

    def chosen_layers(self, module: LightningModule) -> dict[str, _BatchNorm]:
        """The BatchNorm layers within the modules."""
        inside = {id(m) for outer in find_modules(module, self.modules).values() for m in outer.modules()}
        return {name: layer for name, layer in find_bn(module).items() if id(layer) in inside}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; a checkpoint is restored after this."""
        if stage == "fit":
            self._generator.manual_seed(self.seed)
            self._before = 0

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, and what it could not do so far."""
        return {"generator": self._generator.get_state(), "unshuffled": self.unshuffled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._generator.set_state(state_dict["generator"])
        self._before = state_dict["unshuffled"]

    def __getstate__(self) -> dict[str, Any]:
        """With the generator as bytes: spawned processes cannot open the shared memory that torch would put it into."""
        return {**super().__getstate__(), "_generator": bytes(self._generator.get_state().tolist())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(torch.tensor(list(state["_generator"]), dtype=torch.uint8))
        self.__dict__.update(state, _generator=generator)

    def _give(self, module: LightningModule) -> Handle:
        return roi_shuffle(module, modules=self.modules, generator=self._generator)

    def _take_back(self) -> None:
        self._before = self.unshuffled
        super()._take_back()
