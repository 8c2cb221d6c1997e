"""PreciseBN: recompute the population statistics of a fixed model (paper, Sec. 3.2).

The model sees the batches with only its BatchNorm layers in batch mode. The moments of every input of a layer are
merged, over batches, calls and ranks, and written into the layer's running statistics at the very end, or not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.population import LayerStatistics, PopulationStatistics
from lightning_bn.functional.domain.tensors import STATISTICS
from lightning_bn.functional.measure import NormalizationBatchSize, PassConfig, measure, no_progress
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

    With $\mu_B, \sigma_B^2$ the statistics of a layer's input in one batch, each weighted by its number of values,

    $$\mu_{pop} = E[\mu_B], \qquad \sigma_{pop}^2 = E[\mu_B^2 + \sigma_B^2] - E[\mu_B]^2,$$

    computed by merging counts, means and sums of squared deviations in float64. Only BatchNorm is in batch mode:
    everything else runs in eval mode (dropout is off), without gradients, and gets its modes back. Layers that are
    frozen, not chosen by ``layers`` or not reached keep their statistics; a layer counts as frozen if `freeze_bn` or
    ``BaseFinetuning`` froze it, or if it is in eval mode while ``model`` itself is in train mode.

    When it does not help: with i.i.d. batches of decent size, one domain and a converged model, the EMA is as good
    (Sec. 3.3). Batches smaller than about 100 samples accumulate error in depth: 28.8 % validation error at batches
    of 2 against 23.5 % (Table 2), whatever the number of samples. ``normalization_batch_size`` mends that, for batches of any size
    and structure: their forwards wait for each other at every layer, which normalizes them all with their pooled
    statistics (lockstep). Each still runs once, where the paper's layer-by-layer algorithm (App. A.3) runs each as
    often as there are layers.

    Args:
        model: The model. ``DistributedDataParallel`` is looked through: its buffer broadcast must not run here.
        batches: Any iterable of batches. Under torch.distributed every rank calls this, each with its own batches,
            in any number.
        forward: ``forward(model, batch)`` runs the model on a batch. By default the model is called on the batch, on
            its first element if that is a tuple or list, or with it as keywords if it is a mapping.
        num_samples: Take whole batches until so many samples were seen, on all ranks together. 1e3 to 1e4 suffice
            (Table 1). None takes all batches.
        normalization_batch_size: B of Table 2, the samples of all ranks that a layer normalizes together: whole batches, as few as
            hold so many; 100 suffice. ``"population"``: all of them, which is exact. None takes the batches as they
            come, each rank its own. A layer that is called several times in a forward (two views, several crops)
            normalizes each call by itself, as in training, with ``"population"`` each over the population; its
            statistics are those of the inputs of all its tracked calls together. The inputs of all calls in one batch
            would be normalized together, and give later layers other inputs.
        tolerance: Stop before ``num_samples``, as soon as the standard errors of every layer's means (in sigma) and
            variances (relative), as the spread of at least 8 normalization batches tells them, are below it.
        memory_limit: Bytes that batches waiting for each other may take on each rank; those that have waited longest
            are put to the host's memory, or to disk (the folder of temporary files), until it is their turn. By default
            nothing is, and needing more than is free is an error.
        layers: Glob patterns over qualified layer names; None estimates every BatchNorm layer that is not frozen.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples in a batch; by default the first size of its tensors, and the
            length of lists of images or dicts.
        progress: Show a progress bar over samples.

    Returns:
        What was measured, for every layer that was reached.

    Raises:
        ValueError: If there is nothing to estimate or no batch, or if every batch gave a layer non-finite values; the
            layers then keep the statistics they had.
        TypeError: If it cannot be seen what a layer normalizes: its forward makes no ``batch_norm`` call, nor does it
            normalize its input as torch's own layers do.
        LockstepError: With ``normalization_batch_size``, if batches come to layers in different order, or influence each other
            through something that the model keeps between layers.
        MemoryError: With ``normalization_batch_size``, if the memory that is free does not suffice.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bn import precise_bn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> statistics = precise_bn(model, torch.randn(20, 50, 4))  # 20 batches of 50 samples
        >>> statistics
        PopulationStatistics(1 layers, 1000 samples in 20 batches)
        >>> bool(torch.equal(model[1].running_mean, statistics["1"].mean.float()))
        True

        All of them as one batch, and whether that matters:

        >>> exact = precise_bn(model, torch.randn(20, 50, 4), normalization_batch_size="population")
        >>> mean_gap, var_gap = exact.gaps_to(statistics)["1"]
    """
    config = PassConfig(num_samples, normalization_batch_size, tolerance, memory_limit, batch_size_fn)
    chosen, statistics = measure_model(model, batches, config, forward, layers, progress)
    write_running_stats(chosen, statistics)
    return statistics


def measure_model(
    model: nn.Module,
    batches: Iterable[Any],
    config: PassConfig,
    forward: Forward[Any] | None,
    layers: Layers,
    progress: bool,
    of_training: bool = True,
) -> tuple[dict[str, _BatchNorm], PopulationStatistics]:
    """The layers that `precise_bn` estimates, and what it measures. Writes nothing.

    Raises:
        ValueError: As `precise_bn`.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    chosen = estimable_layers(model, layers)
    if not chosen:
        raise ValueError(
            f"All chosen BatchNorm layers of {type(model).__name__} are frozen (by freeze_bn or BaseFinetuning, or "
            "in eval mode while the model is in train mode): there are no statistics to recompute."
        )
    with keep_in_eval([m for m in model.modules() if m not in set(chosen.values())]):
        return chosen, measure(
            chosen,
            batches,
            lambda batch: (forward or call_model)(model, batch),
            config,
            of_training=of_training,
            progress=_tqdm if progress else no_progress,
        )


def estimable_layers(
    model: nn.Module, layers: Layers = None, trains: Callable[[nn.Module], bool] | None = None
) -> dict[str, _BatchNorm]:
    """The layers whose statistics a pass estimates: the chosen ones that store statistics and are not frozen.

    Args:
        model: The model.
        layers: Glob patterns; naming a layer that stores no statistics is an error, leaving it out by default is not.
        trains: Whether a layer is in train mode when the model trains; callbacks know. By default the modes are taken
            to say so if ``model`` is in train mode, and to say nothing if it is not.

    Raises:
        ValueError: If there is no BatchNorm layer that stores statistics.
    """
    found = storing_layers(model, layers)
    trains = trains or (lambda layer: layer.training or not model.training)
    return {name: layer for name, layer in found.items() if not is_frozen(layer) and trains(layer)}


def write_running_stats(layers: Mapping[str, _BatchNorm], statistics: Mapping[str, LayerStatistics]) -> None:
    """Store measured statistics as the layers' running statistics, in place and in the buffers' own dtype.

    Raises:
        ValueError: If a variance is too large for that dtype; nothing is then written.
    """
    with torch.no_grad():
        writes = []
        for name, measured in statistics.items():
            stored = layers[name]._buffers
            writes += _rounded(name, measured, stored["running_mean"], stored["running_var"])
            for domain, own in enumerate(measured.domains):
                if own is not None:
                    mean, var, batches = (cast(Tensor, stored[key]) for key in STATISTICS)
                    writes += _rounded(name, own, mean[domain], var[domain])
                    writes.append((batches[domain], batches[domain].clamp(min=1)))
        for buffer, value in writes:
            buffer.copy_(value)


def _rounded(
    name: str, measured: LayerStatistics, mean: Tensor | None, var: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    writes = []
    for buffer, stored, value in (("running_mean", mean, measured.mean), ("running_var", var, measured.var)):
        assert stored is not None  # storing_layers saw to it
        rounded = value.to(stored.dtype)
        if not rounded.isfinite().all():
            largest = float(value.abs().max())
            raise ValueError(f"{buffer} of layer {name!r} reaches {largest:.3g}: {stored.dtype} cannot hold it.")
        writes.append((stored, rounded))
    return writes


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch, on its first element if that is a tuple or list, or with a mapping as keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextlib.contextmanager
def _tqdm(total: int | None) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm  # which only those need who ask for a display

    with tqdm(total=total, desc="PreciseBN", unit="sample", leave=False) as bar:

        def advance(samples: int) -> None:
            bar.update(samples)

        yield advance
