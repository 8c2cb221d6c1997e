"""Random exchange of rows among ranks, with gradients.

Every rank draws the same permutation of all ranks' rows and cuts it into equal runs, one per rank. One all-to-all sends
the rows; outputs and gradients take the inverse route. A collective in backward waits for every rank, so each exchange
has an *anchor*, a scalar through which its backward always passes, even on a rank without rows.
"""

from __future__ import annotations

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
from lightning_bn.core.row_structure import RowStructure

T = TypeVar("T")


@dataclass(frozen=True)
class Route:
    """Lists the row indices of one rank: ``sent`` ordered by target rank, ``received_at`` by source rank."""

    sent: Tensor
    sent_sizes: list[int]
    received_at: Tensor
    received_sizes: list[int]

    @classmethod
    def of(cls, rank: int, counts: Sequence[int], order: Tensor) -> Route:
        """Compute a rank's route for ``counts`` rows per rank, where row ``order[i]`` of all becomes row ``i``."""
        ranks = len(counts)
        sizes = [len(order) // ranks + (r < len(order) % ranks) for r in range(ranks)]
        source = torch.arange(ranks).repeat_interleave(torch.tensor(counts))[order]
        target = torch.arange(ranks).repeat_interleave(torch.tensor(sizes))
        # sender and receiver list the rows of a message by their index in the new order
        leaving, arriving = ((ranks_of == rank).nonzero().flatten() for ranks_of in (source, target))
        arriving = arriving[source[arriving].argsort(stable=True)]
        return cls(
            sent=order[leaving] - sum(counts[:rank]),
            sent_sizes=target[leaving].bincount(minlength=ranks).tolist(),
            received_at=arriving - sum(sizes[:rank]),
            received_sizes=source[arriving].bincount(minlength=ranks).tolist(),
        )

    def inverse(self) -> Route:
        return Route(self.received_at, self.received_sizes, self.sent, self.sent_sizes)

    def to(self, device: torch.device) -> Route:
        return replace(self, sent=self.sent.to(device), received_at=self.received_at.to(device))


@dataclass
class Exchange:
    """Holds the state of one exchange, from `exchange_rows` to `restore_rows`.

    Attributes:
        route: Where this rank's rows go; None if no rows were exchanged.
        group: The ranks; None for all.
        anchor: Scalar that connects the exchange to the graph.
    """

    route: Route | None
    group: dist.ProcessGroup | None
    anchor: Tensor | None = None


def exchange_rows(rows: T, *, generator: torch.Generator, group: dist.ProcessGroup | None = None) -> tuple[T, Exchange]:
    r"""Exchange rows at random among ranks, with gradients.

    Rank $r$ has $n_r$ rows, possibly zero, and gets $n / k$ of all $n = \sum_r n_r$ rows in random order, rounded up or
    down. If $n < 2k$, or with one rank, every rank keeps its own rows.

    Every rank must call it and `restore_rows` in the same order. If any rank needs gradients, every rank's loss must
    depend on the restored output (use ``0 * output.sum()``). Second derivatives are not supported. Activation
    checkpointing works: recomputed rows take the route of the forward, among the generator's last 256 exchanges.

    Args:
        rows: A tensor or any pytree of tensors ``(n_r, ...)``; ranks may differ only in $n_r$. Numbers, strings and
            0-dimensional tensors stay.
        generator: CPU generator that draws the order, in the same state on every rank.
        group: The ranks; None for all.

    Returns:
        The rows that this rank has now, in the same structure, and the exchange, for `restore_rows`.

    Raises:
        ValueError: If tensors differ in the number of rows, or ranks in dtype, shape, structure or generator state.
        TypeError: If a list or object in the structure may contain rows, or if ``generator`` is not on the CPU.
        RuntimeError: In a backward, if the rows match no recorded exchange.

    Example:
        >>> import torch
        >>> from lightning_bn import exchange_rows, restore_rows
        >>> def head(features, boxes):  # on every rank
        ...     (features, boxes), exchange = exchange_rows((features, boxes), generator=generator)
        ...     return restore_rows(features * boxes.sum(1, keepdim=True), exchange=exchange)
        >>> generator = torch.Generator().manual_seed(0)
        >>> head(torch.ones(2, 1), torch.ones(2, 4))  # one process: no exchange
        tensor([[4.],
                [4.]])
    """
    check_generator(generator)
    if get_world_size(group) == 1:
        return rows, Exchange(None, group)
    structure = RowStructure.of(rows, "exchange_rows was given")
    recomputed = torch._C._current_graph_task_id() != -1  # the forward runs inside a backward
    drawn = 0 if recomputed else int(torch.randint(2**62, (), generator=generator))
    headers = _all_gather_headers(structure, drawn, _checksum(structure.tensors), group)
    if len({header.drawn for header in headers}) > 1:
        raise ValueError("The ranks' generators are in different states: seed and advance them alike on all ranks.")
    key = tuple((header.rows, header.checksum) for header in headers)
    route = _recorded_route(generator, key) if recomputed else _new_route(generator, key, group)
    exchange = Exchange(route, group)
    if route is None:
        return rows, exchange
    return cast(T, _exchange(structure, route, exchange, headers)), exchange


def check_generator(generator: Any) -> None:
    """Raise unless it is a CPU generator."""
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        given = f"one on {generator.device}" if isinstance(generator, torch.Generator) else repr(generator)
        raise TypeError(f"generator must be a torch.Generator on the CPU but is {given}.")


def restore_rows(outputs: T, *, exchange: Exchange) -> T:
    """Return the outputs for exchanged rows to each row's original rank and index.

    Args:
        outputs: A tensor or any pytree of tensors ``(rows, ...)``, with one row per row that this rank got.
        exchange: Returned by `exchange_rows`.

    Returns:
        The same structure, with one row per original row of this rank.

    Raises:
        ValueError: If tensors have another number of rows, or ranks differ in dtype, shape or structure.
        TypeError: If a list or object in the structure may contain rows.

    Example:
        >>> import torch
        >>> from lightning_bn import exchange_rows, restore_rows
        >>> rows, exchange = exchange_rows(torch.ones(2, 1), generator=torch.Generator())
        >>> restore_rows(rows, exchange=exchange).shape
        torch.Size([2, 1])
    """
    if exchange.route is None:
        return outputs
    structure = RowStructure.of(outputs, "restore_rows was given", len(exchange.route.received_at))
    headers = _all_gather_headers(structure, 0, 0, exchange.group)
    return cast(T, _exchange(structure, exchange.route.inverse(), exchange, headers))


def add_anchors(outputs: T, anchors: Sequence[Tensor]) -> T:
    """Let the backward of every output that requires a gradient pass through all anchors, with gradient 0."""
    if not anchors:
        return outputs

    def add(output: Tensor) -> Tensor:
        return cast(Tensor, _AddAnchors.apply(output, *anchors)) if output.requires_grad else output

    return cast(T, pytree.tree_map_only(Tensor, add, outputs))


class _Header(NamedTuple):
    rows: int
    drawn: int
    layout: int
    checksum: int
    needs_gradient: int


def _all_gather_headers(
    structure: RowStructure, drawn: int, checksum: int, group: dist.ProcessGroup | None
) -> list[_Header]:
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in structure.tensors)
    own = torch.tensor(_Header(structure.rows, drawn, structure.layout, checksum, needs), dtype=torch.int64)
    own = own.to(collective_device(structure.tensors[0].device))
    gathered = own.new_empty(get_world_size(group), len(own))
    dist.all_gather(list(gathered), own, group=group)
    headers = [_Header(*integers) for integers in gathered.tolist()]
    if len({header.layout for header in headers}) > 1:
        raise ValueError(
            "Ranks hold rows of different dtype or shape, or at other places of a structure (for example in another "
            f"order of keys); this one {', '.join(structure.describe())}."
        )
    return headers


def _checksum(tensors: Sequence[Tensor]) -> int:
    # bits of 65536 evenly spaced values per tensor, which identify recomputed rows
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    with torch.no_grad():
        plain = [(torch.view_as_real(t) if t.is_complex() else t).contiguous().flatten() for t in tensors]
        sample = [t.view(integers[t.element_size()])[:: t.numel() // 65536 + 1] for t in plain]
        return sum(int(values.sum()) for values in sample) % 2**62


_Key: TypeAlias = tuple[tuple[int, int], ...]  # number of rows and checksum of each rank
# the last routes of each generator, for recomputed forwards
_ROUTES: WeakKeyDictionary[torch.Generator, deque[tuple[_Key, Route | None]]] = WeakKeyDictionary()


def _new_route(generator: torch.Generator, key: _Key, group: dist.ProcessGroup | None) -> Route | None:
    counts = [rows for rows, _ in key]
    route = None
    if sum(counts) >= 2 * len(counts):
        order = torch.randperm(sum(counts), generator=generator)
        route = Route.of(dist.get_rank(group), counts, order)
    _ROUTES.setdefault(generator, deque(maxlen=256)).append((key, route))
    return route


def _recorded_route(generator: torch.Generator, key: _Key) -> Route | None:
    for recorded, route in reversed(_ROUTES.get(generator, ())):
        if recorded == key:
            return route
    raise RuntimeError(
        "Rows were exchanged in a backward that no forward has exchanged. Activation checkpointing has to recompute "
        "the same numbers: make the code before the exchange deterministic, or checkpoint only within the module."
    )


def _exchange(structure: RowStructure, route: Route, exchange: Exchange, headers: Sequence[_Header]) -> Any:
    tensors: Sequence[Tensor] = structure.tensors
    device = tensors[0].device
    route = route.to(device)
    # if any rank needs gradients, all must join the exchange of gradients
    if not any(header.needs_gradient for header in headers):
        return structure.rebuild(_all_to_all(route, exchange.group, tensors))
    anchor = torch.zeros((), device=device, requires_grad=True) if exchange.anchor is None else exchange.anchor
    with torch.enable_grad():
        exchange.anchor, *tensors = cast("Any", _AllToAll.apply(route, exchange.group, anchor, *tensors))
    return structure.rebuild(tensors)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, route: Route, group: dist.ProcessGroup | None, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        received = _all_to_all(route, group, tensors)
        ctx.route, ctx.group = route, group
        ctx.differentiable = [t.is_floating_point() or t.is_complex() for t in tensors]
        ctx.mark_non_differentiable(*(r for r, wanted in zip(received, ctx.differentiable, strict=True) if not wanted))
        return anchor.clone(), *received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [grad for grad, wanted in zip(grads, ctx.differentiable, strict=True) if wanted]
        returned = iter(_all_to_all(ctx.route.inverse(), ctx.group, wanted))
        return None, None, anchor, *(next(returned) if wanted else None for wanted in ctx.differentiable)


class _AddAnchors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *anchors: Tensor) -> Tensor:
        ctx.devices = [anchor.device for anchor in anchors]
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros((), device=device) for device in ctx.devices)


def _all_to_all(route: Route, group: dist.ProcessGroup | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    # one all-to-all: rows of all tensors are concatenated to rows of bytes
    parts = [_as_bytes(t.detach().index_select(0, route.sent)) for t in tensors]
    sent = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    sent = sent.to(collective_device(sent.device))
    received = sent.new_empty(len(route.received_at), sent.shape[1])
    dist.all_to_all_single(received, sent, route.received_sizes, route.sent_sizes, group=group)
    results = []
    for t, part in zip(tensors, received.to(tensors[0].device).split([p.shape[1] for p in parts], 1), strict=True):
        rows = t.new_empty(len(part), *t.shape[1:])
        _as_bytes(rows).copy_(part)
        results.append(torch.empty_like(rows).index_copy_(0, route.received_at, rows))
    return results


def _as_bytes(rows: Tensor) -> Tensor:
    flat = rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)
    return flat.contiguous().view(torch.uint8)
