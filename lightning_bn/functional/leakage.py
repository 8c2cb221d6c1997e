"""Leakage: whether samples that a BatchNorm layer normalizes together were put together at random (paper, Sec. 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.core.batch_copy import copied_with
from lightning_bn.core.batch_sizes import BatchSizeFn, as_batch_size_fn
from lightning_bn.core.ranks import agreed, gather_rows, get_rank, get_world_size, sum_over_ranks
from lightning_bn.functional.leakage_rows import RowMeans, Rows, by_sample
from lightning_bn.functional.leakage_test import comparable, icc, icc_noise, leading_components, permutation_test
from lightning_bn.functional.precise import Forward, call_model, estimable_layers
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.find import Layers
from lightning_bn.layers.modes import keep_in_eval

_MAX_ROWS = 4096
"""Of one call of one layer, of all ranks; more are thinned at random."""


@dataclass(frozen=True)
class BatchLeakage:
    """How alike the samples of normalization batches are.

    Attributes:
        p_value: Probability of batches as unlike chance as these, over all layers, if they were put together at random.
        icc: Layer's name -> intra-class correlation of the samples that it normalizes together: positive if they are
            alike, negative if they are balanced, about 0 if they were put together at random. Of a layer that is called
            several times in a forward, that of the most conspicuous call.
        noise: Layer's name -> standard deviation that the correlation has without leakage.
        left_out: Layer's name -> why it could not be tested, where it was given rows and they are not its samples.
    """

    p_value: float
    icc: dict[str, float]
    noise: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def worst_layer(self) -> str:
        """The layer whose correlation is the most times its noise."""
        return max(self.icc, key=lambda name: abs(self.icc[name]) / self.noise[name])


def batch_leakage(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward[Any] | None = None,
    layers: Layers = None,
    batch_size_fn: BatchSizeFn | None = None,
) -> BatchLeakage:
    r"""Test whether samples that are normalized together are alike, or balanced, more than chance has it.

    Where batches are put together by a pattern, a model can learn to read it off the batch statistics, and is lost in
    evaluation: with batches of 16 classes x 2 images validation error was 51.1 % with population statistics and 23.3 %
    with mini-batch statistics in batches of the same pattern (Fig. 8); in an R-CNN head whose batch is the regions of
    one image, box AP was 30.7 instead of 41.7 (Table 3).

    The model is run in eval mode, since in train mode BatchNorm subtracts from each batch what its samples share. Of
    every sample a layer is given, the mean over space is kept; a layer's 16 leading principal components of those give
    the intra-class correlation of its normalization batches,

    $$ICC = \frac{MS_B - MS_W}{MS_B + (m - 1) MS_W}$$

    with $MS_B$ and $MS_W$ the mean squares between and within batches of $m$ rows. The p-value is that of the most
    conspicuous layer against up to 19,999 random regroupings of the same rows into batches of the same sizes. It is
    exact: over random batches it falls below 1 % in at most 1 % of tests. Layers that are given other rows than others
    are, those of a head that runs on regions say, are tested by themselves, and the smallest p-value counts as often as
    there are such sets of layers (Bonferroni). The calls of a layer within a forward, of several feature levels say,
    are compared among themselves, not with each other.

    A normalization batch is what a layer normalizes together when it trains: a call's rows, of one rank, or of all that
    share statistics (`sync_bn`, SyncBatchNorm), or a group of them (`ghost_bn`).

    Where a sample is several rows of a layer (tokens, views of an image), its rows are averaged: that they are alike
    and always together is no leak. Which rows are of which sample is seen by running the model on a batch once more
    with each sample in the next one's place; a layer of which that does not tell (regions of several images, nodes of
    graphs) is left out. Where each normalization batch is the rows of a *single* sample, the rows themselves are
    compared: they are put together by their sample, which is the leak of an R-CNN head on one image's regions.

    When it does not help: it says that batches are not i.i.d., not what that costs; easy tasks take no harm (ten
    digits as 8 classes x 2: 3.6 % error against 3.8). Some 4000 samples in 4 batches or more are needed to see 16
    classes x 2 in 32. Epochs without repetition should not be mixed: a sample that comes in two batches, but never
    twice in one, makes those more unlike than chance.

    Args:
        model: The model. ``DistributedDataParallel`` is looked through.
        batches: Batches as they are put together in training. Under torch.distributed every rank calls this, each with
            its own; it ends with the first rank that has no more. They have to end: cut an endless iterator off
            (``itertools.islice``).
        forward: ``forward(model, batch)`` runs the model on a batch. By default the model is called on the batch, on
            its first element if that is a tuple or list, or with it as keywords if it is a mapping.
        layers: Glob patterns over qualified layer names; None tests every BatchNorm layer that is not frozen.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors, or the length of a list.

    Returns:
        The p-value, and the correlation of each layer; the same on all ranks.

    Raises:
        ValueError: If there is nothing to compare: no layer, one normalization batch only, normalization batches of
            one row, rows that are all equal but for rounding, or of which it cannot be told whose they are.
        RuntimeError: If another rank met an error.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bn import batch_leakage
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> samples = torch.randn(1024, 4)
        >>> batch_leakage(model, samples.split(32)).p_value > 0.01
        True
        >>> ordered = samples[samples[:, 0].argsort()]
        >>> found = batch_leakage(model, ordered.split(32))
        >>> found.p_value, found.icc["1"] > 0.1
        (5e-05, True)
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    chosen = estimable_layers(model, layers)
    if not chosen:
        raise ValueError(
            f"All chosen BatchNorm layers of {type(model).__name__} are frozen, or in eval mode while the model is in "
            "train mode: they normalize with the population, through which nothing leaks."
        )
    with keep_in_eval(list(model.modules())):
        return measure_leakage(
            chosen, batches, lambda batch: (forward or call_model)(model, batch), as_batch_size_fn(batch_size_fn)
        )


def measure_leakage(
    layers: Mapping[str, _BatchNorm],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    batch_size_fn: BatchSizeFn,
    seed: int = 0,
) -> BatchLeakage:
    """Run batches through the fixed model and test what ``layers`` were given.

    Args:
        layers: Qualified name -> layer, in eval mode.
        batches: This rank's batches; as many are run as the rank with fewest has.
        run: Runs the model on one batch.
        batch_size_fn: Samples in a batch.
        seed: Of the regroupings.

    Raises:
        ValueError: If there is nothing to compare.
        RuntimeError: If another rank met an error.
    """
    rows = RowMeans(layers)
    device = next(iter(layers.values())).running_mean.device  # type: ignore[union-attr]  # estimable layers have one
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        Handle(layers.values(), rows),
    ):
        iterator, missing = iter(batches), object()
        while True:
            with agreed(device):
                batch = next(iterator, missing)
            ready, *_ = sum_over_ranks([batch is not missing], device)
            if ready < get_world_size():
                break
            with agreed(device):
                samples = batch_size_fn(batch)
                rows.next_batch(samples)
                run(batch)
            unplaced, *_ = sum_over_ranks([rows.unplaced], device)
            if unplaced:  # on all ranks: there may be collectives in a forward
                with agreed(device):
                    rows.probe(partial(run, _rolled(batch, samples)))
        return _tested(_of_all_ranks(layers, rows), _eps_of_all_ranks(layers, rows), _left_out(layers, rows), seed)


def _rolled(batch: Any, samples: int) -> Any:
    """A copy of a batch with each sample in the place of the one after it, as far as its tensors show samples."""

    def roll(tensor: Tensor) -> Tensor:
        twin = tensor.detach().clone()
        if twin.ndim and len(twin) == samples:
            twin.copy_(twin.roll(1, 0))  # in place, so that it stays of its class
        return twin

    try:
        return copied_with(roll, batch)
    except TypeError:  # then nothing shows whose rows are whose
        return batch


def _left_out(layers: Mapping[str, _BatchNorm], rows: RowMeans) -> dict[str, str]:
    """Layers that any rank has left out, with its reason or the like."""
    own = gather_rows(torch.tensor([[name in rows.left_out for name in layers]], dtype=torch.long)).amax(0)
    reasons = {name: rows.left_out.get(name, "as another rank found, its rows are not its samples") for name in layers}
    return {name: reason for (name, reason), left in zip(reasons.items(), own.tolist(), strict=True) if left}


def _eps_of_all_ranks(layers: Mapping[str, _BatchNorm], rows: RowMeans) -> dict[str, float]:
    """Machine precision of each layer's coarsest input."""
    own = torch.tensor([[rows.eps.get(name, 0.0) for name in layers]], dtype=torch.float64)
    return dict(zip(layers, gather_rows(own).amax(0).tolist(), strict=True))


def _of_all_ranks(layers: Mapping[str, _BatchNorm], rows: RowMeans) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Means and normalization batches of all ranks' rows, of every call; on the CPU."""
    calls = gather_rows(torch.tensor([[sum(name == n for n, _ in rows.seen) for name in layers]])).amax(0)
    found = {}
    for name, number in zip(layers, calls.tolist(), strict=True):
        for call in range(number):
            empty = torch.zeros(0, dtype=torch.long)
            nothing = Rows(torch.zeros(0, layers[name].num_features, dtype=torch.float64), empty, empty)
            kept = [nothing, *rows.seen.get((name, call), [])]
            parts = [
                torch.cat([part.cpu().to(like) for part in of])
                for of, like in zip(zip(*kept, strict=True), nothing, strict=True)
            ]
            share = _MAX_ROWS // get_world_size()
            if len(parts[0]) > share:  # the same ones in all layers that were given as many
                thinned = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0))[:share]
                parts = [part[thinned] for part in parts]
            found[name, call] = by_sample(Rows(*map(gather_rows, parts)))
    return found


def _tested(
    calls: dict[tuple[str, int], tuple[Tensor, Tensor]], eps: dict[str, float], left_out: dict[str, str], seed: int
) -> BatchLeakage:
    """The test on rank 0, whose result every rank takes: two kinds of processor may differ in the last bits."""
    names = [name for name in dict.fromkeys(name for name, _ in calls) if name not in left_out]
    table: list[tuple[float, float]] = []
    with agreed(torch.device("cpu")):
        if get_rank() == 0:
            table = _table({key: call for key, call in calls.items() if key[0] in names}, names, eps, seed)
    (p_value, _), *rows = gather_rows(torch.tensor(table, dtype=torch.float64).view(-1, 2)).tolist()
    tested = {name: row for name, row in zip(names, rows, strict=True) if row[0] == row[0]}  # else NaN
    if not tested:
        raise ValueError(
            "There is nothing to compare: a layer has to be given two normalization batches or more, one of them of "
            "two rows or more, of rows that are finite and differ by more than rounding"
            + (f", and that can be told apart by sample. {said_of(left_out)}" if left_out else ".")
        )
    correlations, noises = ({name: row[i] for name, row in tested.items()} for i in (0, 1))
    return BatchLeakage(p_value, correlations, noises, left_out)


def said_of(left_out: Mapping[str, str]) -> str:
    """Layers that were left out, in a sentence that says what to do."""
    name, reason = next(iter(left_out.items()))
    others = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    return (
        f"Layer {name!r}{others} is left out: {reason}. If samples were miscounted, pass batch_size_fn=, a function from batch "
        "to number of samples."
    )


def _table(
    calls: dict[tuple[str, int], tuple[Tensor, Tensor]], names: list[str], eps: dict[str, float], seed: int
) -> list[tuple[float, float]]:
    """The p-value, then the correlation and noise of each layer; NaN for one that has nothing to compare."""
    found: dict[str, tuple[float, float]] = {}
    together: dict[bytes, tuple[Tensor, list[Tensor]]] = {}  # by which rows share which batches
    for (name, _), (means, batches) in calls.items():
        components = leading_components(means, eps=eps[name])
        if comparable(components, batches):
            correlation, noise = icc(components, batches), icc_noise(components, batches)
            if name not in found or abs(correlation / noise) > abs(found[name][0] / found[name][1]):
                found[name] = correlation, noise
            together.setdefault(batches.numpy().tobytes(), (batches, []))[1].append(components)
    p_values = [permutation_test(components, batches, seed=seed) for batches, components in together.values()]
    p_value = min(1.0, len(p_values) * min(p_values, default=1.0))
    return [(p_value, 0.0), *(found.get(name, (torch.nan, torch.nan)) for name in names)]
