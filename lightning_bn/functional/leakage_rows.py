"""RowMeans: a behavior that records the mean over space of each sample, and its normalization batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.ranks import get_rank, get_world_size
from lightning_bn.functional.sync import Synced
from lightning_bn.layers.behavior import Behavior, behaviors_of
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm

_MAX_ROWS_PER_CALL = 256
"""A random part of a larger input says as much."""

_MAX_BATCH_SIZE = 2**20
"""Upper bound of samples in a batch, and of groups in an input: makes their numbers unique."""

Call: TypeAlias = tuple[str, int]
"""A layer's name, and the number of its call within a batch."""


class Rows(NamedTuple):
    """Means over space ``(n, C)`` of rows; numbers of their normalization batches, and of their samples, ``(n,)``.

    Both numbers are unique over all ranks.
    """

    means: Tensor
    batches: Tensor
    samples: Tensor


class RowMeans(Behavior):
    """Record each row's mean over space, and the normalization batch that it is in when the model trains.

    If a batch of several samples has several rows per sample (tokens, views), the mean of each sample is recorded.
    `probe` finds out which rows belong to which sample. A layer for which it cannot is left out.

    Attributes:
        rows: Rows of each batch's input, by call.
        unknown: Means and normalization batches of this batch's inputs whose layout is unknown: `probe` is needed.
        eps: Layer name -> machine precision of its coarsest input.
        left_out: Layer name -> why it is not tested.
    """

    name = "row means"

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.rows: dict[Call, list[Rows]] = {}
        self.unknown: dict[Call, tuple[Tensor, Tensor]] = {}
        self.eps: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self._names = {layer: name for name, layer in layers.items()}
        self._batch, self._samples = -1, 0
        self._calls: dict[str, int] = {}
        # number of blocks in which the samples repeat, and rows per sample when that was found
        self._layouts: dict[Call, tuple[int, int]] = {}
        self._rolled: dict[Call, Tensor] | None = None

    def next_batch(self, samples: int) -> None:
        """Begin the next batch, of so many samples."""
        self._batch, self._samples, self._calls = self._batch + 1, samples, {}

    def probe(self, run: Callable[[], object]) -> None:
        """Find out which rows belong to which sample; ``run`` runs the model on the batch rolled by one sample."""
        self._rolled, self._calls = {}, {}
        try:
            run()
            for (name, call), (means, batches) in self.unknown.items():
                rolled = self._rolled.get((name, call), means[:0])
                blocks = _blocks(means, rolled, self._samples, self.eps[name])
                if blocks is None:
                    self.left_out[name] = f"its {len(means)} rows cannot be assigned to {self._samples} samples"
                else:
                    self._layouts[name, call] = blocks, len(means) // self._samples
                    self._record((name, call), means, batches)
        finally:
            self._rolled, self.unknown = None, {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        name = self._names[layer]
        before = self._calls.get(name)
        read = partial(self._read, layer, name)
        output = replace_batch_norm(read, name, forward, input, required=False)
        if self._calls.get(name) == before:
            self.left_out[name] = "its forward does not call torch.nn.functional.batch_norm"
        return output

    def _read(self, layer: _BatchNorm, name: str, call: BatchNormCall) -> Tensor:
        input, number = call.input, self._calls.get(name, -1) + 1
        self._calls[name] = number
        if len(input) and name not in self.left_out:
            rows = input.detach().to(torch.promote_types(input.dtype, torch.float32))
            means = rows.flatten(2).mean(-1) if rows.ndim > 2 else rows
            if self._rolled is not None:
                self._rolled[name, number] = means
            else:
                self.eps[name] = max(self.eps.get(name, 0.0), torch.finfo(input.dtype).eps)
                self._record((name, number), means, _normalization_batches(layer, input, self._batch))
        return call.run()

    def _record(self, call: Call, means: Tensor, batches: Tensor) -> None:
        per_sample, rest = divmod(len(means), max(self._samples, 1))
        if self._samples == 1 or len(means) == self._samples:
            samples = torch.arange(len(means)) % self._samples
        elif rest or not self._samples:
            self.left_out[call[0]] = f"{len(means)} rows of {self._samples} samples: their numbers differ"
            return
        else:
            blocks, known_for = self._layouts.get(call, (0, 0))
            if not blocks or (blocks > 1 and per_sample != known_for):  # a single block may have any length
                self.unknown[call] = means, batches
                return
            places = torch.arange(self._samples).repeat_interleave(per_sample // blocks).repeat(blocks)
            of_rows, samples = batches, torch.arange(self._samples)
            means, batches = _means_by(places, means), of_rows.new_zeros(self._samples).index_copy_(0, places, of_rows)
            if not torch.equal(batches[places], of_rows):
                self.left_out[call[0]] = "a sample's rows are in several normalization batches (ghosts)"
                return

        if len(means) > _MAX_ROWS_PER_CALL:  # the same rows in all layers with as many
            generator = torch.Generator().manual_seed(self._batch)
            part = torch.randperm(len(means), generator=generator)[:_MAX_ROWS_PER_CALL]
            means, batches, samples = means[part], batches[part], samples[part]
        samples = samples + _number(self._batch, get_rank())
        self.rows.setdefault(call, []).append(Rows(means, batches, samples))


def by_sample(rows: Rows) -> tuple[Tensor, Tensor]:
    """Means and normalization batches of samples; of rows if each batch is a single sample's, as in an R-CNN head."""
    pairs, place = torch.stack([rows.batches, rows.samples], 1).unique(dim=0, return_inverse=True)
    if len(pairs) == len(rows.batches.unique()):
        return rows.means, rows.batches
    return _means_by(place, rows.means), pairs[:, 0]


def _blocks(means: Tensor, rolled: Tensor, samples: int, eps: float) -> int | None:
    """Number of blocks with the same number of rows of every sample, from the rows of the rolled batch; or None."""
    if len(rolled) != len(means):
        return None
    means, rolled = means.nan_to_num(), rolled.nan_to_num()
    per_sample = len(means) // samples
    for blocks in (b for b in range(1, per_sample + 1) if per_sample % b == 0):
        expected = means.view(blocks, samples, per_sample // blocks, -1).roll(1, 1).view_as(means)
        # rounding depends on a row's position
        if (rolled - expected).abs().amax() <= max(1e-4, 4 * eps) * means.abs().amax():
            return blocks
    return None


def _means_by(places: Tensor, rows: Tensor) -> Tensor:
    counts = places.bincount()  # on the CPU: CUDA's is refused where only deterministic algorithms are allowed
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, places.to(rows.device), rows)
    return sums / counts.to(rows.device)[:, None]


def _normalization_batches(layer: _BatchNorm, input: Tensor, batch: int) -> Tensor:
    """Number of each row's normalization batch, unique over all ranks."""
    rank = get_rank()
    if get_world_size() > 1:
        shared = [b.group for b in behaviors_of(layer) if isinstance(b, Synced)]
        if isinstance(layer, SyncBatchNorm):
            shared.append(cast("ProcessGroup | None", layer.process_group))
        rank = min(dist.get_process_group_ranks(shared[0])) if shared else rank
    groups = (behavior.normalization_groups(input) for behavior in behaviors_of(layer))
    none = torch.zeros(len(input), dtype=torch.long)
    return _number(batch, rank) + next((g for g in groups if g is not None), none)


def _number(batch: int, rank: int) -> int:
    """The first number of samples, or groups, of a rank's batch."""
    return (batch * get_world_size() + rank) * _MAX_BATCH_SIZE
