"""Parameters on loan: a forward may change them in any way, and they are given back what they had, bit for bit.

Momentum encoders and mean teachers are updated by the training step itself, `nn.Embedding(max_norm=...)` and weights
that are normalized in the step change as they are used: what changes a parameter is no mistake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

FixedModel: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Entered for each forward: it begins with the parameters that the first one began with."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def preserve_parameters(module: nn.Module) -> Iterator[FixedModel]:
    """Lend parameters copies of their values, and take those back on leaving.

    The objects stay what they are, since optimizers and DDP hold them; only what they point to is exchanged. So nothing
    has to be searched for changes at the end (a change through ``.data`` leaves no mark, and on a GPU each look waits),
    nothing is written back where an autograd graph may still need it, and an exception leaves nothing half done. The
    price is a second copy of the weights while a pass runs, which has neither gradients nor activations to keep.
    """
    parameters = [*module.parameters(), *filter(is_lazy, module.buffers())]
    kept = [(p, type(p), p.data, p.grad, p.requires_grad) for p in parameters]
    try:
        for p in parameters:
            p.grad = None  # a step that takes gradients itself must not add to those of the training
        yield _Lent([p for p in parameters if _can_be_lent(p)]).fixed
    finally:
        for p, kind, data, gradient, required in kept:
            if type(p) is not kind:  # a lazy one was reached for the first time
                p.__class__ = kind
            p.data = data
            p.grad = gradient
            if p.requires_grad != required:
                p.requires_grad = required


def _can_be_lent(p: Tensor) -> bool:
    """Not what wraps other tensors, which cannot be pointed elsewhere; lazy and inference tensors need it not."""
    return not is_lazy(p) and type(p.data) is Tensor and p.layout == torch.strided and not p.is_inference()


class _Lent:
    """Parameters that work on copies of their values, and what is known of which of them a forward changes."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._originals = [p.data for p in parameters]
        self._copies = _copied(self._originals)
        for p, copy in zip(parameters, self._copies, strict=True):
            p.data = copy
        self._marks = [_mark(p) for p in parameters]
        self._changing: set[int] = set()
        self._begun = self._ended = 0

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Run a forward of the model as it is, not as the forwards before have left it."""
        self._begun += 1
        if self._begun == 2 and not self._ended:  # in lockstep the first one waits in its middle
            self._compare()
        self._put_back()
        yield
        self._ended += 1
        if self._ended == 1:  # a step does the same every time; what it begins with later shows in the marks
            self._compare()

    def _compare(self) -> None:
        self._changing |= _different(self._originals, self._parameters)

    def _put_back(self) -> None:
        marks = [_mark(p) for p in self._parameters]
        self._changing |= {i for i, mark in enumerate(marks) if mark != self._marks[i]}
        for i in self._changing:
            self._parameters[i].data = self._copies[i].copy_(self._originals[i])
            self._marks[i] = _mark(self._parameters[i])


def _mark(p: Tensor) -> tuple[int, int]:
    """Differs after a change, but for one in place through ``.data``; known without waiting for the device."""
    return p._version, p.data_ptr()


def _different(originals: Sequence[Tensor], parameters: Sequence[Tensor]) -> set[int]:
    """Which have other bits now, in one synchronization."""
    changed = set()
    flags = {}
    for i, (a, b) in enumerate(zip(originals, (p.data for p in parameters), strict=True)):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            changed.add(i)
        else:
            flags[i] = (_bits(a) != _bits(b)).any().to(originals[0].device)
    found = torch.stack(list(flags.values())).tolist() if flags else []
    return changed | {i for i, differs in zip(flags, found, strict=True) if differs}


def _bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.view(_BITS[t.element_size()])


def _copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, of which those share a storage whose originals do: an RNN's weights lie in one piece on a GPU."""
    together = Counter(t.untyped_storage()._cdata for t in tensors)
    storages: dict[int, torch.UntypedStorage] = {}
    copies = []
    for t in tensors:
        storage = t.untyped_storage()
        if together[storage._cdata] == 1:
            copies.append(t.clone())  # not more than it needs: its storage may be a whole data set's
            continue
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()
        own = torch.empty(0, dtype=t.dtype, device=t.device)
        copies.append(own.set_(storages[storage._cdata], t.storage_offset(), t.shape, t.stride()))
    return copies
