"""RoI shuffle: exchange the rows that enter chosen modules at random among ranks (paper, Sec. 6.1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.core.compiler import disable_compile
from lightning_bn.core.exchange import add_anchors, check_generator, exchange_rows, restore_rows
from lightning_bn.core.ranks import get_rank, get_world_size, own_group
from lightning_bn.layers.behavior import Handle, ModuleBehavior, has_behavior
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import find_modules


class Shuffle(Handle):
    """Handle of `roi_shuffle`.

    Attributes:
        unshuffled: Number of train-mode calls that exchanged no rows, because there were fewer than two per rank.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], generator: torch.Generator) -> None:
        group, destroy = own_group()
        self._shuffle = RowShuffle(model, modules, generator, group)
        super().__init__(modules.values(), self._shuffle, [destroy])
        # inside of DDP, which searches the outputs for parameters without a gradient
        root = model.module if isinstance(model, DistributedDataParallel) else model
        self._undo += Handle([root] if modules else [], AnchorBackward(self._shuffle))._undo

    @property
    def unshuffled(self) -> int:
        return self._shuffle.unshuffled


def roi_shuffle(model: nn.Module, *, modules: str | Sequence[str], generator: torch.Generator | None = None) -> Shuffle:
    r"""Exchange, in training, the rows that enter chosen modules at random among ranks; outputs return to their own.

    Rows of one rank are often alike: an R-CNN head gets hundreds of regions of one image. Normalized together, they
    leak information about each other, and the head exploits it. If rank $r$ of $k$ has $n_r$ rows, possibly zero, its
    modules get a random $n / k$ of all $n = \sum_r n_r$. The output for a row returns to the row's rank and index;
    gradients take the same route. Modules without BatchNorm compute the same losses and gradients as without it.

    It helps heads that see many regions of few images, and momentum encoders of contrastive learning
    (``modules="encoder_k"``). `sync_bn` has the same accuracy in the paper (Table 3) and sends less. With one process
    it does nothing and warns; use `ghost_bn`. Nothing is exchanged in eval mode, in passes of `precise_bn`, in modules
    whose BatchNorm layers are all frozen, and if there are fewer than two rows per rank. Compiled models run the
    modules eagerly.

    Requirements (otherwise training deadlocks until the process-group timeout):

    - Every rank calls ``roi_shuffle`` and ``undo()``, and runs the modules in train mode the same number of times in
      the same order, with zero rows if it has none.
    - If one rank runs backward, all do, from outputs of ``model``, which all pass their backward through the exchanges.
      With activation checkpointing with ``use_reentrant=True``, or in a LightningModule that runs its own backward,
      each rank's loss must depend on the modules' outputs (``0 * output.sum()``).

    Args:
        model: The model that each training step calls, wrapped by DDP or not; the compiled model if it is compiled.
        modules: Glob patterns over qualified module names, such as ``"roi_heads.box_head"``. Of nested matches the
            outermost counts. Each module takes and returns tensors, or structures of tensors, with one row each.
        generator: CPU generator that draws the order, in the same state on every rank; None makes one with seed 0.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to stop exchanging rows.

    Raises:
        ValueError: If a pattern matches nothing or a container without forward (a ModuleList), or a layer has a
            conflicting behavior (`roi_shuffle`, `sync_bn`, `domain_bn`); in a forward, if a module's tensors differ in
            the number of rows, or the ranks' in dtype, shape or place in the structure.
        TypeError: If ``generator`` is not a CPU generator; in a forward, if a module takes or returns something else
            that may contain rows, such as a list of as many numbers as there are rows.

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
    check_generator(generator)
    chosen = find_modules(model, modules)
    for name, module in chosen.items():
        if type(module).forward is nn.Module.forward and "forward" not in vars(module):
            members = f"select its members (modules={name + '.*'!r})"
            raise ValueError(f"Module {name!r} is a {type(module).__name__}, which is never called itself: {members}.")
    inside = {f"{name}.{n}" if n else name: m for name, module in chosen.items() for n, m in module.named_modules()}
    check_conflicts(inside, "row shuffle", model)
    if get_world_size() == 1:
        advice = "To separate similar samples of its batch use Ghost BN (ghost_bn, GhostBNCallback)."
        warnings.warn(f"roi_shuffle changes nothing: there is one process. {advice}", stacklevel=2)
        return Shuffle(model, {}, generator)
    without = [name for name, module in chosen.items() if not _batch_norms(module)]
    if without and get_rank() == 0:
        what = f"Module {without[0]!r} has no BatchNorm layer: exchanging its rows costs time and changes nothing."
        warnings.warn(what, stacklevel=2)
    return Shuffle(model, chosen, generator)


class RowShuffle(ModuleBehavior):
    """In train mode, exchanges the rows of a module's arguments among ranks, and restores its outputs.

    Attributes:
        anchors: Anchors of the exchanges in the running call of the whole model; None outside of it.
    """

    kind = "row shuffle"
    name = "rows exchanged"

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], generator: torch.Generator, group: ProcessGroup | None
    ) -> None:
        self._names = {module: name for name, module in modules.items()}
        self._layers = _batch_norms(model)
        self._inside = {module: _batch_norms(module) for module in modules.values()}
        self._generator, self._group = generator, group
        self.unshuffled = 0
        self.anchors: list[Tensor] | None = None

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not module.training or any(has_behavior(layer, "batch mode") for layer in self._layers):
            return call(*args, **kwargs)  # in a pass ranks do not synchronize
        inside = self._inside[module]
        if inside and not any(layer.training and not has_behavior(layer, "frozen") for layer in inside):
            return call(*args, **kwargs)
        return self._call_with_exchange(module, call, args, kwargs)

    @disable_compile
    def _call_with_exchange(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self._names[module]
        with _name_in_errors(name):
            (args, kwargs), exchange = exchange_rows((args, kwargs), generator=self._generator, group=self._group)
        self.unshuffled += exchange.route is None
        output = call(*args, **kwargs)
        with _name_in_errors(name):
            output = restore_rows(output, exchange=exchange)
        if self.anchors is not None and exchange.anchor is not None:
            self.anchors.append(exchange.anchor)
        return output


class AnchorBackward(ModuleBehavior):
    """Lets the backward of every output of the whole model pass through the exchanges made in its call."""

    name = ""

    def __init__(self, shuffle: RowShuffle) -> None:
        self._shuffle = shuffle

    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._shuffle.anchors is not None:  # a training step that calls its own module
            return call(*args, **kwargs)
        anchors: list[Tensor] = []
        self._shuffle.anchors = anchors
        try:
            output = call(*args, **kwargs)
        finally:
            self._shuffle.anchors = None
        return add_anchors(output, anchors)


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


@contextmanager
def _name_in_errors(module: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"Module {module!r}: {error}") from error
