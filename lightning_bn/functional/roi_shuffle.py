"""RoI shuffle: rows that enter chosen modules are exchanged at random among ranks (paper, Sec. 6.1)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.core.exchange import require_generator
from lightning_bn.core.ranks import get_rank, get_world_size, own_group
from lightning_bn.functional.row_shuffle import AnchorBackward, RowShuffle
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import find_modules


class Shuffle(Handle):
    """The way back, which also counts the calls that could not be shuffled.

    Attributes:
        unshuffled: Calls in train mode whose rows stayed, because there were fewer than two a rank.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], generator: torch.Generator) -> None:
        group, destroy = own_group()
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._exchanged = RowShuffle(modules, layers, generator, group)
        super().__init__(modules.values(), self._exchanged, [destroy])
        # within DDP, which looks through the outputs for parameters that got no part in them
        root = model.module if isinstance(model, DistributedDataParallel) else model
        self._undo += Handle([root] if modules else [], AnchorBackward(self._exchanged))._undo

    @property
    def unshuffled(self) -> int:
        return self._exchanged.unshuffled


def roi_shuffle(model: nn.Module, *, modules: str | Sequence[str], generator: torch.Generator | None = None) -> Shuffle:
    r"""Exchange, in training, the rows that enter chosen modules at random among ranks; outputs return to their own.

    Rows of one rank are often alike: an R-CNN head is given hundreds of regions of one image. Normalized together they
    tell on each other, and the head learns to listen. Shuffled, a normalization batch holds rows of all ranks, as
    evaluation's population does. Rank $r$ of $k$ brings $n_r$ rows, zero among others, and its modules are given a
    random $n / k$ of all $n = \sum_r n_r$, rounded up or down; what they return for a row goes back to the row's rank
    and place. Losses never notice, and gradients travel the same ways. Without BatchNorm in the modules, losses and
    gradients are those of no shuffle.

    When it helps: heads that see many regions of few images (Mask R-CNN with BatchNorm in its heads, one image per
    device: box AP 30.7 without, 41.7 with, population statistics in both; two images 40.1 and 41.6; Table 3). Momentum
    encoders of contrastive learning, whose pairs must not share a batch (ShuffleBN: ``modules="encoder_k"``). When it
    does not: where samples are independent already; `sync_bn` does as well at the same price in accuracy, 41.7, and
    moves a few numbers per channel in place of the rows. With one process there is nobody to exchange rows with: Ghost
    BN, over groups of different samples, is what helps there.

    Nothing is exchanged in eval mode, in passes of `precise_bn`, in modules whose BatchNorm layers are all frozen, and,
    on all ranks, where there are fewer than two rows a rank: the handle counts these calls, as ``unshuffled``.

    Cost: a row that changes ranks, $(k-1)/k$ of them, travels once in and its output once out, the same in backward;
    one all-to-all and one exchange of five numbers for each of the two in forward, one all-to-all in backward, at which
    all ranks wait for the slowest (benchmarks/RESULTS.md). Compiled, the modules run eagerly.

    What it asks of you, under pain of ranks that wait for each other until torch.distributed gives up:

    - Every rank calls ``roi_shuffle`` and ``undo()`` alike, and comes to the modules equally often in the same order,
      in train mode, with zero rows where it has none.
    - If one rank runs backward, all do, from what a call of ``model`` returned. Whether the loss uses the modules'
      outputs does not matter: every output of ``model`` takes backward by the exchanges. Except where the modules run
      under activation checkpointing with ``use_reentrant=True``, or where a LightningModule runs its own backward:
      there each rank's loss has to depend on them (``0 * output.sum()``).

    Args:
        model: The model that is trained, wrapped by DDP or not: what is called in each training step. After
            ``compiled = torch.compile(model)`` it is ``compiled``, which goes past anything that ``model`` is given.
        modules: Glob patterns over qualified names of modules, such as ``"roi_heads.box_head"``; of modules within each
            other the outermost counts. Each takes and returns tensors, or structures of tensors, of one row each.
        generator: Draws the order of rows, on the CPU; on every rank one in the same state. None makes one of seed 0.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to leave rows where they are again.

    Raises:
        ValueError: If a pattern matches nothing, or a container that has no forward of its own (a ModuleList), or a
            module is shuffled already; in a forward, if a module's tensors differ in the number of rows, or ranks in
            their dtype, shape or place in the structure, or where `domain_bn` tells datasets apart.
        TypeError: If ``generator`` is none; in a forward, if a module is given or returns something in which rows could
            hide, such as a list of as many numbers as there are rows.

    Example:
        >>> import torch
        >>> from torch import distributed as dist, nn
        >>> from lightning_bn import roi_shuffle
        >>> def main():  # torchrun --nproc-per-node 2
        ...     dist.init_process_group("gloo")
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        ...     with roi_shuffle(model, modules="1"):
        ...         return model(torch.randn(3 + dist.get_rank(), 4))  # normalized over rows of both
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    require_generator(generator)
    chosen = find_modules(model, modules)
    for name, module in chosen.items():
        if type(module).forward is nn.Module.forward and "forward" not in vars(module):
            raise ValueError(
                f"Module {name!r} is a {type(module).__name__}, which is never called itself: name its members "
                f"(modules={name + '.*'!r})."
            )
    inside = {f"{name}.{n}" if n else name: m for name, module in chosen.items() for n, m in module.named_modules()}
    check_conflicts(inside, "row shuffle", model)
    if get_world_size() == 1:
        warnings.warn(
            "roi_shuffle changes nothing: there is one process, and nobody to exchange rows with. What helps against "
            "alike samples in one batch there is Ghost BN (ghost_bn, GhostBNCallback).",
            stacklevel=2,
        )
        chosen = {}
    elif get_rank() == 0:
        idle = [n for n, module in chosen.items() if not any(isinstance(m, _BatchNorm) for m in module.modules())]
        if idle:
            warnings.warn(
                f"Module {idle[0]!r} has no BatchNorm layer: exchanging its rows costs time and changes nothing.",
                stacklevel=2,
            )
    return Shuffle(model, chosen, generator)
