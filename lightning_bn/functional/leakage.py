"""batch_leakage: test whether normalization batches are random in their samples (paper, Sec. 6)."""

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
"""Rows of one call of one layer, of all ranks; of more a random part is tested."""


@dataclass(frozen=True)
class BatchLeakage:
    """Result of a leakage test.

    Attributes:
        p_value: p-value over all layers, under the hypothesis of random batches.
        icc: Layer name -> intra-class correlation of samples normalized together: positive if they are alike, negative
            if they are balanced, about 0 if random. For a layer with several calls, that of the most extreme call.
        noise: Layer name -> standard deviation of the correlation without leakage.
        left_out: Layer name -> why it could not be tested.
    """

    p_value: float
    icc: dict[str, float]
    noise: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def worst_layer(self) -> str:
        """The layer with the largest ratio of correlation and noise."""
        return max(self.icc, key=lambda name: abs(self.icc[name]) / self.noise[name])


def batch_leakage(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward[Any] | None = None,
    layers: Layers = None,
    batch_size_fn: BatchSizeFn | None = None,
) -> BatchLeakage:
    r"""Test whether samples normalized together are more alike, or more balanced, than random ones (Sec. 6).

    The model runs in eval mode: train-mode BatchNorm removes the batch mean that shows the pattern. For each layer
    the samples' means over space, projected on 16 principal components, give the intra-class correlation

    $$ICC = \frac{MS_B - MS_W}{MS_B + (m - 1) MS_W}$$

    with $MS_B$, $MS_W$ the mean squares between and within normalization batches of $m$ samples: what the layer
    normalizes together in training, with `ghost_bn`, `sync_bn` and SyncBatchNorm. The most extreme layer is compared
    with up to 19,999 random regroupings of the same rows; p-values of layers with other rows are combined (Bonferroni).
    Several rows of a sample (tokens, views) are averaged; the batch is then run once more to assign rows to samples. If
    each normalization batch is a single sample's rows, rows are compared.

    When it does not help: it does not measure the cost of leakage. It needs about 4000 samples in 4 batches or more.

    Args:
        model: The model. ``DistributedDataParallel`` is unwrapped.
        batches: Finitely many batches, composed as in training. Under torch.distributed every rank passes its own;
            the test ends with the rank that has the fewest.
        forward: ``forward(model, batch)`` runs the model on a batch; None calls it as `precise_bn` does.
        layers: Glob patterns over qualified layer names; None tests every BatchNorm layer that is not frozen.
        batch_size_fn: Number of samples in a batch; None takes the first size of tensors, or the length of a list.

    Returns:
        The p-value, and the correlation of each layer; equal on all ranks.

    Raises:
        ValueError: If there is nothing to compare: no layer, a single normalization batch, only batches of one row,
            equal rows, or rows that cannot be assigned to samples.
        RuntimeError: If another rank failed.

    Example:
        >>> import torch
        >>> from lightning_bn import batch_leakage
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
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
    estimable = estimable_layers(model, layers)
    if not estimable:
        raise ValueError(
            f"All chosen BatchNorm layers of {type(model).__name__} are frozen, or in eval mode while the model is in "
            "train mode: they normalize with population statistics, through which nothing leaks."
        )
    run, size_of = partial(forward or call_model, model), as_batch_size_fn(batch_size_fn)
    with keep_in_eval(list(model.modules())):
        return measure_leakage(estimable, batches, run, size_of)


def measure_leakage(
    layers: Mapping[str, _BatchNorm],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    batch_size_fn: BatchSizeFn,
    *,
    seed: int = 0,
) -> BatchLeakage:
    """Run batches through a model in eval mode and test the inputs of ``layers``; see `batch_leakage`."""
    rows = RowMeans(layers)
    device = next(iter(layers.values())).running_mean.device  # type: ignore[union-attr]  # estimable layers have one
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), Handle(layers.values(), rows):
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
            unknown, *_ = sum_over_ranks([bool(rows.unknown)], device)
            if unknown:  # on any rank: all run the model again, since its forward may contain collectives
                with agreed(device):
                    rows.probe(partial(run, _rolled(batch, samples)))
    return _test_on_rank_zero(layers, rows, seed)


def left_out_message(left_out: Mapping[str, str]) -> str:
    """A sentence that names the layers left out, why, and what to do."""
    name, reason = next(iter(left_out.items()))
    others = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    advice = "If samples were miscounted, pass batch_size_fn=, a function from batch to number of samples."
    return f"Layer {name!r}{others} is left out: {reason}. {advice}"


def _rolled(batch: Any, samples: int) -> Any:
    """A copy of a batch with each sample in the next one's place, in all tensors that hold samples."""

    def roll(tensor: Tensor) -> Tensor:
        twin = tensor.detach().clone()
        if twin.ndim and len(twin) == samples:
            twin.copy_(twin.roll(1, 0))  # in place, to keep the tensor's class
        return twin

    try:
        return copied_with(roll, batch)
    except TypeError:  # then the layout stays unknown
        return batch


def _test_on_rank_zero(layers: Mapping[str, _BatchNorm], rows: RowMeans, seed: int) -> BatchLeakage:
    """Test the rows of all ranks on rank 0 and share its result: processors may differ in the last bits."""
    own = [[name in rows.left_out, sum(name == n for n, _ in rows.rows), rows.eps.get(name, 0.0)] for name in layers]
    of_all = gather_rows(torch.tensor([own], dtype=torch.float64)).amax(0).tolist()
    reason = "another rank cannot assign its rows to samples"
    left_out: dict[str, str] = {}
    found: dict[str, list[tuple[Tensor, Tensor, float]]] = {}  # means, batches and precision of each call
    for (name, layer), (is_left_out, calls, eps) in zip(layers.items(), of_all, strict=True):
        if is_left_out:
            left_out[name] = rows.left_out.get(name, reason)
        inputs = [_of_all_ranks(rows.rows.get((name, i), []), layer.num_features) for i in range(int(calls))]
        if inputs and not is_left_out:
            found[name] = [(*means_and_batches, eps) for means_and_batches in inputs]
    table: list[tuple[float, float]] = []
    with agreed(torch.device("cpu")):
        if get_rank() == 0:
            table = _table(found, seed)
    (p_value, _), *results = gather_rows(torch.tensor(table, dtype=torch.float64).view(-1, 2)).tolist()
    tested = {name: row for name, row in zip(found, results, strict=True) if row[0] == row[0]}  # else NaN
    if not tested:
        raise ValueError(
            "There is nothing to compare: a layer needs two normalization batches or more, one of them of two rows or "
            "more, with rows that are finite, differ by more than rounding, and can be assigned to samples."
            + (f" {left_out_message(left_out)}" if left_out else "")
        )
    correlations, noises = ({name: row[i] for name, row in tested.items()} for i in (0, 1))
    return BatchLeakage(p_value, correlations, noises, left_out)


def _of_all_ranks(inputs: list[Rows], channels: int) -> tuple[Tensor, Tensor]:
    """Means and normalization batches of all ranks' samples of a call, on the CPU."""
    none = torch.zeros(0, dtype=torch.long)
    all_inputs = [Rows(torch.zeros(0, channels, dtype=torch.float64), none, none), *inputs]
    parts = [torch.cat([part.cpu().to(of[0]) for part in of]) for of in zip(*all_inputs, strict=True)]
    share = _MAX_ROWS // get_world_size()
    if len(parts[0]) > share:  # the same rows in all layers with as many
        part = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0))[:share]
        parts = [values[part] for values in parts]
    return by_sample(Rows(*map(gather_rows, parts)))


def _table(layers: Mapping[str, list[tuple[Tensor, Tensor, float]]], seed: int) -> list[tuple[float, float]]:
    """The p-value, then correlation and noise of each layer, from its calls; NaN if there is nothing to compare."""
    table = []
    by_groups: dict[bytes, tuple[Tensor, list[Tensor]]] = {}  # layers with the same rows in the same groups
    for calls in layers.values():
        found = []
        for means, batches, eps in calls:
            components = leading_components(means, eps=eps)
            if comparable(components, batches):
                found.append((icc(components, batches), icc_noise(components, batches)))
                by_groups.setdefault(batches.numpy().tobytes(), (batches, []))[1].append(components)
        table.append(max(found, key=lambda row: abs(row[0] / row[1]), default=(torch.nan, torch.nan)))
    p_values = [permutation_test(components, batches, seed=seed) for batches, components in by_groups.values()]
    return [(min(1.0, len(p_values) * min(p_values, default=1.0)), 0.0), *table]
