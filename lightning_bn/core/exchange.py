"""Rows exchanged at random among ranks, and brought home, with gradients (paper, Sec. 6.1).

All rows of all ranks are put into one random order, which is cut into equal runs, one a rank. Every rank draws the same
order, so each knows by itself which of its rows go where: only those that change ranks travel, in one all-to-all. The
way home, and the way of the gradients, is the same route reversed.

Collectives in backward wait for every rank, so every rank has to come to them. Each exchange therefore has an
*anchor*, a number that its backward always passes through: on a rank without rows or without history it is what makes
the exchange part of the graph, and `add_anchors` hangs it on a loss that may have no other use for what came back.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from lightning_bn.core.ranks import collective_device, get_world_size

T = TypeVar("T")
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
"""What may stand beside tensors in a structure of rows, and stays where it is."""


@dataclass(frozen=True)
class Route:
    """Where the rows of one rank go, and where those it is given come from. Places are indices of rows.

    Attributes:
        before: Rows that the rank has before.
        after: Rows that it has after.
        kept: Places before of rows that stay on the rank, and
        kept_at: their places after.
        sent: Places before of rows that leave, ordered by the rank they go to, and
        sent_sizes: how many go to each rank.
        taken_at: Places after of rows that come, ordered by the rank they come from, and
        taken_sizes: how many come from each rank.
    """

    before: int
    after: int
    kept: Tensor
    kept_at: Tensor
    sent: Tensor
    sent_sizes: list[int]
    taken_at: Tensor
    taken_sizes: list[int]

    @classmethod
    def of(cls, rank: int, counts: Sequence[int], order: Tensor) -> Route:
        """The route of a rank.

        Args:
            rank: The rank.
            counts: Rows of each rank.
            order: A permutation of all rows, ``(sum(counts),)``: row ``order[i]`` of all becomes row ``i`` of all.
        """
        ranks = len(counts)
        sizes = [len(order) // ranks + (r < len(order) % ranks) for r in range(ranks)]
        source = torch.arange(ranks).repeat_interleave(torch.tensor(counts))[order]
        target = torch.arange(ranks).repeat_interleave(torch.tensor(sizes))
        own, given = source == rank, target == rank
        first, first_after = sum(counts[:rank]), sum(sizes[:rank])
        # both ends list the rows of one message by their place in the new order
        leaving = (own & ~given).nonzero().flatten()
        coming = (given & ~own).nonzero().flatten()
        coming = coming[source[coming].argsort(stable=True)]
        staying = (own & given).nonzero().flatten()
        return cls(
            before=counts[rank],
            after=sizes[rank],
            kept=order[staying] - first,
            kept_at=staying - first_after,
            sent=order[leaving] - first,
            sent_sizes=target[leaving].bincount(minlength=ranks).tolist(),
            taken_at=coming - first_after,
            taken_sizes=source[coming].bincount(minlength=ranks).tolist(),
        )

    def home(self) -> Route:
        """The way back."""
        return Route(
            before=self.after,
            after=self.before,
            kept=self.kept_at,
            kept_at=self.kept,
            sent=self.taken_at,
            sent_sizes=self.taken_sizes,
            taken_at=self.sent,
            taken_sizes=self.sent_sizes,
        )

    def to(self, device: torch.device) -> Route:
        """With the places on a device."""
        places = (p.to(device) for p in (self.kept, self.kept_at, self.sent, self.taken_at))
        kept, kept_at, sent, taken_at = places
        return replace(self, kept=kept, kept_at=kept_at, sent=sent, taken_at=taken_at)


@dataclass
class Exchange:
    """What `exchange_rows` did, and `restore_rows` undoes.

    Attributes:
        route: The route of this rank's rows; None if none was exchanged.
        group: The ranks.
        anchor: What the backward of the exchange, and of the way home, always passes through.
    """

    route: Route | None
    group: dist.ProcessGroup | None
    anchor: Tensor | None = None


def exchange_rows(rows: T, generator: torch.Generator, group: dist.ProcessGroup | None = None) -> tuple[T, Exchange]:
    r"""Exchange rows at random among ranks, with gradients.

    Rank $r$ brings $n_r$ rows, none if it has none, and is given $n / k$ of all $n = \sum_r n_r$ rows in a random
    order, rounded up or down. With fewer than two a rank, $n < 2k$, every rank keeps its own.

    Every rank of the group calls this, and `restore_rows` on what it makes of the rows, equally often and in the same
    order. Backward then waits for all ranks, too, if any of them needs gradients: the loss of each has to depend on
    what `restore_rows` returned, be it by ``0 * output.sum()``. There are no second derivatives.

    Recomputed in a backward (activation checkpointing) rows take the route they took in the forward: of the last 256
    exchanges of a generator the latest that had the same rows on all ranks.

    Args:
        rows: A tensor, or any structure of tensors (see ``torch.utils._pytree``), that all have the same number of
            rows, ``(n_r, ...)``. Only the number of rows may differ between ranks, keys have one order on all. Numbers,
            strings and tensors of no dimension in the structure stay.
        generator: Draws the order, on the CPU; on every rank one in the same state.
        group: The ranks; None for all.

    Returns:
        The rows that this rank has now, in the same structure, and what to give to `restore_rows`.

    Raises:
        ValueError: If tensors have different numbers of rows, or, on every rank, if the ranks' rows differ in dtype,
            shape or place in the structure, or their generators in state.
        TypeError: If the structure holds something else, in which rows could hide, such as a list of as many numbers as
            there are rows; or if ``generator`` is none.
        RuntimeError: In a backward, if the rows are not those of any recorded exchange.

    Example:
        >>> import torch
        >>> from lightning_bn import exchange_rows, restore_rows
        >>> def head(features, boxes):  # on every rank
        ...     (features, boxes), exchange = exchange_rows((features, boxes), generator)
        ...     return restore_rows(features * boxes.sum(1, keepdim=True), exchange)
        >>> generator = torch.Generator().manual_seed(0)
        >>> head(torch.ones(2, 1), torch.ones(2, 4))  # one process: nothing to exchange
        tensor([[4.],
                [4.]])
    """
    require_generator(generator)
    if get_world_size(group) == 1:
        return rows, Exchange(None, group)
    structure = _Structure.of(rows, "exchange_rows was given")
    recomputed = torch._C._current_graph_task_id() != -1  # the forward runs inside a backward
    drawn = 0 if recomputed else int(torch.randint(2**62, (), generator=generator))
    said = _all_gather_headers(structure, drawn, _bits(structure.tensors), group)
    if len({words.drawn for words in said}) > 1:
        raise ValueError("The ranks' generators are in different states: seed and advance them alike on all ranks.")
    key = tuple((words.rows, words.bits) for words in said)
    route = _recorded(generator, key) if recomputed else _new_route(generator, key, group)
    if route is None:
        return rows, Exchange(None, group)
    exchange = Exchange(route, group)
    return cast(T, structure.rebuilt(_moved_with_gradients(structure, route, exchange, said))), exchange


def require_generator(generator: Any) -> None:
    """Refuse what cannot draw the order of rows.

    Raises:
        TypeError: If it is no generator of the CPU.
    """
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        given = f"one on {generator.device}" if isinstance(generator, torch.Generator) else repr(generator)
        raise TypeError(f"generator must be a torch.Generator on the CPU but is {given}.")


def restore_rows(outputs: T, exchange: Exchange) -> T:
    """Bring home what was computed of exchanged rows: to the rank each row came from, and its place there.

    Args:
        outputs: A tensor, or any structure of tensors, ``(rows, ...)``, with a row for each that this rank was given.
        exchange: What `exchange_rows` returned.

    Returns:
        The same structure, with a row for each that this rank had before.

    Raises:
        ValueError: If tensors have another number of rows, or, on every rank, if outputs differ in dtype, shape or
            place in the structure.
        TypeError: If the structure holds something else.
    """
    if exchange.route is None:
        return outputs
    structure = _Structure.of(outputs, "restore_rows was given", exchange.route.after)
    said = _all_gather_headers(structure, 0, 0, exchange.group)
    return cast(T, structure.rebuilt(_moved_with_gradients(structure, exchange.route.home(), exchange, said)))


def add_anchors(outputs: T, anchors: Sequence[Tensor]) -> T:
    """``outputs``, of which any that requires a gradient takes backward through all ``anchors``, with gradient 0."""
    if not anchors:
        return outputs

    def tie(output: Tensor) -> Tensor:
        return cast(Tensor, _Tied.apply(output, *anchors)) if output.requires_grad else output

    return cast(T, pytree.tree_map_only(Tensor, tie, outputs))


class _Structure(NamedTuple):
    """A structure of rows, taken apart."""

    tensors: list[Tensor]
    places: list[str]
    leaves: list[Any]
    spec: pytree.TreeSpec
    rows: int

    @classmethod
    def of(cls, value: Any, was_given: str, rows: int | None = None) -> _Structure:
        """Take apart a structure of rows, as many as ``rows`` where that is known."""
        leaves, spec = pytree.tree_flatten(value)
        tensors = [leaf for leaf in leaves if _has_rows(leaf)]
        places = [place for place, leaf in zip(_places(value, len(leaves)), leaves, strict=True) if _has_rows(leaf)]
        strange = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
        if rows is not None:  # an output of no dimension is a sum over rows of other ranks
            strange += [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.ndim]
        if strange or not tensors:
            what = "no tensor" if not strange else f"a {type(strange[0]).__name__} that is no tensor of rows"
            raise TypeError(f"{was_given} {what}: only tensors whose first dimension is rows can change ranks.")
        found = sorted({len(t) for t in tensors} | ({rows} if rows is not None else set()))
        if len(found) > 1:
            raise ValueError(f"{was_given} tensors of different numbers of rows: {', '.join(map(str, found))}.")
        _check_hidden_rows(value, found[0], was_given)
        return cls(tensors, places, leaves, spec, found[0])

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """The same structure with other tensors of rows."""
        new = iter(tensors)
        return pytree.tree_unflatten([next(new) if _has_rows(leaf) else leaf for leaf in self.leaves], self.spec)

    @property
    def layout(self) -> int:
        """The same number, on all ranks, for tensors at the same places that differ in nothing but rows."""
        return zlib.crc32(", ".join(self.described()).encode())

    def described(self) -> list[str]:
        """Place, dtype and shape of each tensor."""
        shapes = [f"{t.dtype} (rows, {', '.join(map(str, t.shape[1:]))})" for t in self.tensors]
        return [f"{place} {shape}".strip() for place, shape in zip(self.places, shapes, strict=True)]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _places(value: Any, leaves: int) -> list[str]:
    """Where each leaf of a structure is, as ``[1]['boxes']``."""
    try:
        return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
    except ValueError:  # a container whose class says how to take it apart, but not what its parts are called
        return [f"[{number}]" for number in range(leaves)]


def _check_hidden_rows(value: Any, rows: int, was_given: str) -> None:
    """Refuse lists with something for every row that is no tensor of rows: it would stay while rows change ranks.

    One thing is not a list, and two numbers in a tuple are a size.
    """

    def hides(part: Any) -> bool:
        if type(part) not in (list, tuple) or len(part) != rows or rows < 2:
            return False
        leaves = pytree.tree_leaves(part)
        if type(part) is tuple and rows == 2 and all(isinstance(leaf, (int, float)) for leaf in leaves):
            return False
        said = any(isinstance(leaf, (int, float, complex, str, Tensor)) for leaf in leaves)
        return said and not any(_has_rows(leaf) for leaf in leaves)

    for part in pytree.tree_leaves(value, is_leaf=hides):
        if hides(part):
            raise TypeError(
                f"{was_given} a {type(part).__name__} of {rows} things that are no tensors of rows, and {rows} rows: "
                "only tensors whose first dimension is rows can change ranks. Make one of them, or leave it out."
            )


class _Header(NamedTuple):
    """What a rank tells the others before an exchange."""

    rows: int
    drawn: int
    layout: int
    bits: int
    needs_gradient: int


def _all_gather_headers(structure: _Structure, drawn: int, bits: int, group: dist.ProcessGroup | None) -> list[_Header]:
    """What each rank says, in the order of ranks."""
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in structure.tensors)
    own = torch.tensor(_Header(structure.rows, drawn, structure.layout, bits, needs), dtype=torch.int64)
    own = own.to(collective_device(structure.tensors[0].device))
    gathered = own.new_empty(get_world_size(group), len(own))
    dist.all_gather(list(gathered), own, group=group)
    said = [_Header(*words) for words in gathered.tolist()]
    if len({words.layout for words in said}) > 1:
        raise ValueError(
            "Ranks hold rows of different dtype or shape, or at other places of a structure (in another order of keys, "
            f"say); this one {', '.join(structure.described())}."
        )
    return said


def _bits(tensors: Sequence[Tensor]) -> int:
    """A sum of bits of all tensors, by which to know the same rows again: of 65536 values a tensor, evenly spread."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    with torch.no_grad():
        plain = [(torch.view_as_real(t) if t.is_complex() else t).contiguous().flatten() for t in tensors]
        sample = [t.view(words[t.element_size()])[:: t.numel() // 65536 + 1] for t in plain]
        return sum(int(values.sum()) for values in sample) % 2**62


_Key: TypeAlias = tuple[tuple[int, int], ...]
"""Rows of each rank, and their bits."""

_RECORDED: WeakKeyDictionary[torch.Generator, deque[tuple[_Key, Route | None]]] = WeakKeyDictionary()
"""By generator: what it was last drawn for, and the route."""


def _new_route(generator: torch.Generator, key: _Key, group: dist.ProcessGroup | None) -> Route | None:
    """A new route; None with fewer than two rows a rank."""
    counts = [rows for rows, _ in key]
    route = None
    if sum(counts) >= 2 * len(counts):
        order = torch.randperm(sum(counts), generator=generator)
        route = Route.of(dist.get_rank(group), counts, order)
    _RECORDED.setdefault(generator, deque(maxlen=256)).append((key, route))
    return route


def _recorded(generator: torch.Generator, key: _Key) -> Route | None:
    """The route that the same rows took before."""
    for recorded, route in reversed(_RECORDED.get(generator, ())):
        if recorded == key:
            return route
    raise RuntimeError(
        "Rows were exchanged in a backward that no forward has exchanged. Activation checkpointing has to recompute "
        "the same numbers: make what runs before the exchange deterministic, or checkpoint within the module alone."
    )


def _moved_with_gradients(
    structure: _Structure, route: Route, exchange: Exchange, said: Sequence[_Header]
) -> Sequence[Tensor]:
    """Move the rows; where any rank needs gradients, all are ready for the exchange of them."""
    tensors = structure.tensors
    route = route.to(tensors[0].device)
    if not any(words.needs_gradient for words in said):
        return _moved(route, exchange.group, tensors)
    anchor = exchange.anchor
    if anchor is None:
        anchor = torch.zeros((), device=tensors[0].device, requires_grad=True)
    with torch.enable_grad():
        moved = cast("tuple[Tensor, ...]", _Moved.apply(route, exchange.group, anchor, *tensors))
    exchange.anchor, *rows = moved
    return rows


class _Moved(torch.autograd.Function):
    """Rows along a route, and their gradients along the way home."""

    @staticmethod
    def forward(
        ctx: Any, route: Route, group: dist.ProcessGroup | None, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        moved = _moved(route, group, tensors)
        ctx.route, ctx.group = route, group
        ctx.differentiable = [t.is_floating_point() or t.is_complex() for t in tensors]
        ctx.mark_non_differentiable(*(m for m, wanted in zip(moved, ctx.differentiable, strict=True) if not wanted))
        return anchor.clone(), *moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [grad for grad, wanted in zip(grads, ctx.differentiable, strict=True) if wanted]
        home = iter(_moved(ctx.route.home(), ctx.group, wanted))
        return None, None, anchor, *(next(home) if wanted else None for wanted in ctx.differentiable)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *anchors: Tensor) -> Tensor:
        ctx.devices = [anchor.device for anchor in anchors]
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros((), device=device) for device in ctx.devices)


def _moved(route: Route, group: dist.ProcessGroup | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Rows of all tensors along a route, in one all-to-all: those that travel together become one row of bytes."""
    parts = [_as_bytes(t.detach().index_select(0, route.sent)) for t in tensors]
    sent = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    sent = sent.to(collective_device(sent.device))
    taken = sent.new_empty(len(route.taken_at), sent.shape[1])
    dist.all_to_all_single(taken, sent, route.taken_sizes, route.sent_sizes, group=group)
    moved = []
    for t, part in zip(tensors, taken.to(tensors[0].device).split([p.shape[1] for p in parts], 1), strict=True):
        new = t.new_empty(route.after, *t.shape[1:])
        new[route.kept_at] = t.detach()[route.kept]
        come = t.new_empty(len(part), *t.shape[1:])
        _as_bytes(come).copy_(part)
        new[route.taken_at] = come
        moved.append(new)
    return moved


def _as_bytes(rows: Tensor) -> Tensor:
    """Rows of bytes, ``(rows, bytes of a row)``: of contiguous rows a view."""
    flat = rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)
    return flat.contiguous().view(torch.uint8)
