"""Row means: the layer does what it does, and the mean over space of each row of its inputs is kept, by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

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

_MAX_ROWS_OF_A_CALL = 256
"""Of a head that is given a thousand regions an image, a random part says as much."""

_MAX_IN_A_BATCH = 2**20
"""Samples of a batch, or groups of an input."""


class Rows(NamedTuple):
    """What is kept of an input.

    Attributes:
        means: Means over space, ``(n, C)``.
        batches: The number of each one's normalization batch, ``(n,)``: the same on all ranks that share the batch, and
            on no other.
        samples: The number of each one's sample, ``(n,)``, which no other has on any rank.
    """

    means: Tensor
    batches: Tensor
    samples: Tensor


class RowMeans(Behavior):
    """Keep each row's mean over space, and the number of the normalization batch it is in when the model trains.

    Where a batch of several samples comes as several rows of each (tokens, views), one mean of each sample is kept.
    Which rows are of which sample is seen by `probe`; a layer of which it cannot be told is left out. The rows of a
    batch of a single sample are kept as they are.

    Of a larger input 256 rows are kept, chosen at random, the same ones in all layers that are given as many rows.

    Args:
        layers: Qualified name -> layer.

    Attributes:
        seen: Layer's name and number of its call within a batch -> what is kept of each input.
        eps: Layer's name -> machine precision of its coarsest input.
        left_out: Layer's name -> why nothing of it counts.
    """

    name = "row means"

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.seen: dict[tuple[str, int], list[Rows]] = {}
        self.eps: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self._names = {layer: name for name, layer in layers.items()}
        self._batch, self._samples = -1, 0
        self._calls: dict[str, int] = {}
        self._places: dict[tuple[str, int], tuple[int, int]] = {}
        """How often a sample's rows are begun anew in an input, and how many it had when that was seen."""
        self._unplaced: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        """Means and normalization batches of this batch's inputs of which it has not been seen."""
        self._rolled: dict[tuple[str, int], Tensor] | None = None

    def next_batch(self, samples: int) -> None:
        """What comes from now on belongs to the next batch, of so many samples."""
        self._batch += 1
        self._samples = samples
        self._calls = {}

    @property
    def unplaced(self) -> bool:
        """Whether some of this batch's rows await a `probe`."""
        return bool(self._unplaced)

    def probe(self, run: Callable[[], object]) -> None:
        """See which rows are of which sample.

        Args:
            run: Shows the same batch once more, each sample in the place of the one after it.
        """
        self._rolled, self._calls = {}, {}
        try:
            run()
            for (name, call), (means, batches) in self._unplaced.items():
                rolled = self._rolled.get((name, call))
                turns = None if rolled is None else _turns(means, rolled, self._samples, self.eps[name])
                if turns is None:
                    rows = f"which of {len(means)} rows are of which of {self._samples} samples cannot be told"
                    self.left_out[name] = rows
                else:
                    self._places[name, call] = turns, len(means) // self._samples
                    self._keep(name, call, means, batches)
        finally:
            self._rolled, self._unplaced = None, {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Keep the means of what the layer's ``batch_norm`` call is given, then do as ever."""
        called = False

        def instead(call: BatchNormCall) -> Tensor:
            nonlocal called
            called = True
            self._read(layer, call.input)
            return call.run()

        output = replace_batch_norm(instead, self._names[layer], forward, input, required=False)
        if not called:
            self.left_out[self._names[layer]] = "its forward does not call torch.nn.functional.batch_norm"
        return output

    def _read(self, layer: _BatchNorm, input: Tensor) -> None:
        name = self._names[layer]
        call = self._calls[name] = self._calls.get(name, -1) + 1
        if not len(input) or name in self.left_out:
            return
        rows = input.detach().to(torch.promote_types(input.dtype, torch.float32))
        means = rows.flatten(2).mean(-1) if rows.ndim > 2 else rows
        if self._rolled is not None:
            self._rolled[name, call] = means
            return
        self.eps[name] = max(self.eps.get(name, 0.0), torch.finfo(input.dtype).eps)
        first = (self._batch * get_world_size() + _first_rank(layer)) * _MAX_IN_A_BATCH
        self._keep(name, call, means, first + _groups(layer, input))

    def _keep(self, name: str, call: int, means: Tensor, batches: Tensor) -> None:
        each, rest = divmod(len(means), max(self._samples, 1))
        if self._samples == 1 or len(means) == self._samples:
            samples = torch.arange(len(means)) % self._samples
        elif rest or not self._samples:
            self.left_out[name] = f"{len(means)} rows of {self._samples} samples: their numbers differ"
            return
        else:
            turns, seen = self._places.get((name, call), (0, 0))
            if not turns or (turns > 1 and each != seen):  # one turn is one turn, however many rows it has
                self._unplaced[name, call] = means, batches
                return
            samples = _samples_of_rows(self._samples, each, turns)
            means, together = _means_by(samples, means), batches
            batches = together[_first_of_each(samples)]
            if not torch.equal(batches[samples], together):
                self.left_out[name] = "a sample's rows are in several normalization batches (ghosts)"
                return
            samples = torch.arange(self._samples)
        kept = _chosen(len(means), self._batch)
        samples = samples + (self._batch * get_world_size() + get_rank()) * _MAX_IN_A_BATCH
        self.seen.setdefault((name, call), []).append(Rows(means[kept], batches[kept], samples[kept]))


def by_sample(rows: Rows) -> tuple[Tensor, Tensor]:
    """Means and normalization batches of samples; of rows, where each normalization batch is a single sample's.

    In such a batch rows are put together by their sample, which is what a head that runs on the regions of one image
    takes harm from. Where samples are put together, theirs are the means to compare.
    """
    pairs, place = torch.stack([rows.batches, rows.samples], 1).unique(dim=0, return_inverse=True)
    if len(pairs) == len(rows.batches.unique()):
        return rows.means, rows.batches
    return _means_by(place, rows.means), pairs[:, 0]


def _samples_of_rows(samples: int, each: int, turns: int) -> Tensor:
    """The sample of each row, where so many turns hold a part of each sample's rows."""
    return torch.arange(samples).repeat_interleave(each // turns).repeat(turns)


def _turns(means: Tensor, rolled: Tensor, samples: int, eps: float) -> int | None:
    """The turns in which rows come, by what they are once each sample is in the next one's place; None if by none."""
    if len(rolled) != len(means):
        return None
    means, rolled = means.nan_to_num(), rolled.nan_to_num()
    each = len(means) // samples
    for turns in (t for t in range(1, each + 1) if each % t == 0):
        expected = means.view(turns, samples, each // turns, -1).roll(1, 1).view_as(means)
        if (rolled - expected).abs().amax() <= max(1e-4, 4 * eps) * means.abs().amax():  # a place's rounding
            return turns
    return None


def _means_by(places: Tensor, rows: Tensor) -> Tensor:
    """Means of the rows of each place."""
    counts = places.bincount()  # on the CPU: CUDA's is refused where only deterministic algorithms are allowed
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, places.to(rows.device), rows)
    return sums / counts.to(rows.device)[:, None]


def _first_of_each(places: Tensor) -> Tensor:
    first = torch.empty(int(places.amax()) + 1, dtype=torch.long)
    first[places.flip(0)] = torch.arange(len(places)).flip(0)
    return first


def _chosen(rows: int, seed: int) -> Tensor:
    """The rows to keep of so many."""
    if rows <= _MAX_ROWS_OF_A_CALL:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:_MAX_ROWS_OF_A_CALL]


def _groups(layer: _BatchNorm, input: Tensor) -> Tensor:
    """The number of each row's group within the input."""
    for behavior in behaviors_of(layer):
        groups = behavior.normalization_groups(input)
        if groups is not None:  # one at most: no layer can have two
            return groups
    return torch.zeros(len(input), dtype=torch.long)


def _first_rank(layer: _BatchNorm) -> int:
    """The first of the ranks that normalize together."""
    if get_world_size() == 1:
        return 0
    shared = [b.group for b in behaviors_of(layer) if isinstance(b, Synced)]
    if isinstance(layer, SyncBatchNorm):
        shared.append(cast("ProcessGroup | None", layer.process_group))
    return min(dist.get_process_group_ranks(shared[0])) if shared else get_rank()
