"""PreciseBN: recompute the population statistics of a fixed model (paper, Sec. 3.2).

The moments of every input of a layer are merged over batches, calls and ranks, and written at the very end.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.population import LayerStatistics, PopulationStatistics
from lightning_bn.functional.domain.tensors import statistics_of
from lightning_bn.functional.measure import MeasureConfig, NormalizationBatchSize, measure
from lightning_bn.layers.find import Layers, storing_layers
from lightning_bn.layers.frozen import is_frozen
from lightning_bn.layers.modes import keep_in_eval

T = TypeVar("T", bound=nn.Module)
Forward: TypeAlias = Callable[[T, Any], Any]


def precise_bn(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward[Any] | None = None,
    num_samples: int | None = None,
    normalization_batch_size: NormalizationBatchSize = "auto",
    tolerance: float | None = None,
    memory_limit: int | None = None,
    layers: Layers = None,
    batch_size_fn: BatchSizeFn | None = None,
    progress: bool = False,
) -> PopulationStatistics:
    r"""Recompute the population statistics of a fixed model from batches, and store them in its layers.

    With $\mu_B, \sigma_B^2$ the statistics of a layer's input in one batch, weighted by its number of values,

    $$\mu_{pop} = E[\mu_B], \qquad \sigma_{pop}^2 = E[\mu_B^2 + \sigma_B^2] - E[\mu_B]^2.$$

    Everything but BatchNorm runs in eval mode (dropout is off), without gradients. Layers that are frozen, not chosen
    or not reached keep their statistics. A layer counts as frozen if `freeze_bn` or ``BaseFinetuning`` froze it, or if
    it is in eval mode while ``model`` is in train mode.

    When it does not help: with large i.i.d. batches, one domain and a converged model, the EMA is as good (Sec. 3.3).

    Args:
        model: The model. ``DistributedDataParallel`` is unwrapped: its buffer broadcast must not run here.
        batches: Any iterable of batches. Under torch.distributed every rank calls this, with any number of its own.
        forward: ``forward(model, batch)`` runs the model on a batch. By default the model is called on the batch, on
            its first element if that is a tuple or list, or with it as keywords if it is a mapping.
        num_samples: Number of samples of all ranks, in whole batches; 1e3 to 1e4 suffice (Table 1). None takes all.
        normalization_batch_size: Samples of all ranks that a layer normalizes jointly, in whole batches: B of Table 2.
            Small ones accumulate error in depth. ``"loader"`` takes the batches as they come, each rank its own.
            ``"population"`` normalizes all of them jointly, which is exact. ``"auto"`` is ``"loader"`` if every rank's
            first batch holds 32 samples or more; else 100, or as many as fit into half of the free memory. Batches that
            are normalized jointly wait for each other at every layer (lockstep). A layer that is called several times
            in a forward normalizes each call by itself.
        tolerance: Stop before ``num_samples``, as soon as the standard errors of every layer's means (in sigma) and
            variances (relative) are below it. None never stops early.
        memory_limit: Bytes that batches waiting for each other may take on each rank. The rest is moved to the host's
            memory or to temporary files. By default, needing more than is free is an error.
        layers: Glob patterns over qualified layer names; None estimates every BatchNorm layer that is not frozen.
        batch_size_fn: ``batch_size_fn(batch)`` returns the number of samples in a batch; by default the first size of
            its tensors, and the length of lists of images or dicts.
        progress: Show a progress bar over samples.

    Returns:
        The statistics of every layer that was reached.

    Raises:
        ValueError: If there is nothing to estimate or no batch, or if every batch gave a layer non-finite values. The
            layers then keep their statistics.
        TypeError: If a layer's forward makes no ``batch_norm`` call and does not normalize its input as torch's do.
        LockstepError: If batches that are normalized jointly reach layers in different order, or influence each other.
        NotEnoughMemoryError: If batches that are normalized jointly need more memory than is free.

    Example:
        >>> import torch
        >>> from lightning_bn import precise_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> statistics = precise_bn(model, torch.randn(20, 50, 4))  # 20 batches of 50 samples
        >>> statistics
        PopulationStatistics(1 layers, 1000 samples in 20 batches)
        >>> bool(torch.equal(model[1].running_mean, statistics["1"].mean.float()))
        True

        All of them as one batch, and whether that matters:

        >>> exact = precise_bn(model, torch.randn(20, 50, 4), normalization_batch_size="population")
        >>> mean_gap, var_gap = exact.gaps_to(statistics)["1"]
    """
    config = MeasureConfig(num_samples, normalization_batch_size, tolerance, memory_limit, batch_size_fn)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    estimated = estimable_layers(model, layers)
    others = set(model.modules()).difference(estimated.values())
    with keep_in_eval(others):
        run = functools.partial(forward or call_model, model)
        statistics = measure(estimated, batches, run, config, progress=tqdm_progress if progress else None)
    write_running_stats(estimated, statistics)
    return statistics


def estimable_layers(
    model: nn.Module, layers: Layers = None, trains: Callable[[nn.Module], bool] | None = None
) -> dict[str, _BatchNorm]:
    """Return the chosen layers that store statistics and are not frozen: those that a pass estimates.

    ``trains`` says if a layer is in train mode when the model trains, as callbacks know. By default its own mode does
    if ``model`` is in train mode; if it is not, all layers count as training.
    """
    trains = trains or (lambda layer: layer.training or not model.training)
    return {n: layer for n, layer in storing_layers(model, layers).items() if not is_frozen(layer) and trains(layer)}


def write_running_stats(layers: Mapping[str, _BatchNorm], statistics: Mapping[str, LayerStatistics]) -> None:
    """Store measured statistics as the layers' running statistics, in the buffers' own dtype; all of them, or none."""
    writes: list[tuple[str, Tensor, Tensor]] = []  # what it is, the buffer, its new value
    with torch.no_grad():
        for name, layer in layers.items():
            if name not in statistics:
                continue
            measured = statistics[name]
            mean, var, _ = statistics_of(layer)
            writes.append((f"running_mean of layer {name!r}", mean, measured.mean))
            writes.append((f"running_var of layer {name!r}", var, measured.var))
            for domain, part in enumerate(measured.domains):
                if part is not None:
                    mean, var, batches = statistics_of(layer, domain)
                    values = [(mean, part.mean), (var, part.var), (batches, batches.clamp(min=1))]
                    writes += [(f"domain {domain} of layer {name!r}", *value) for value in values]
        rounded = [value.to(buffer.dtype) for _, buffer, value in writes]
        if not torch.cat([value.flatten() for value in rounded]).isfinite().all():  # one question to the device
            where, buffer, value = next(w for w, r in zip(writes, rounded, strict=True) if not r.isfinite().all())
            raise ValueError(f"{where} reaches {float(value.abs().max()):.3g}: {buffer.dtype} cannot hold it.")
        for (_, buffer, _), value in zip(writes, rounded, strict=True):
            buffer.copy_(value)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch, on its first element if that is a tuple or list, or with a mapping as keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextlib.contextmanager
def tqdm_progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar over samples."""
    from tqdm import tqdm

    with tqdm(total=total, desc="PreciseBN", unit="sample", leave=False) as bar:
        yield lambda samples: cast(None, bar.update(samples))
