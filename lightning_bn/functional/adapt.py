"""AdaBN: population statistics of the domain that is evaluated (paper, Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.core.moments import Moments
from lightning_bn.core.population import PopulationStatistics
from lightning_bn.functional.domain.tensors import OWN_STATISTICS, statistics_of
from lightning_bn.functional.measure import MeasureConfig, measure
from lightning_bn.functional.precise import Forward, call_model, estimable_layers, tqdm_progress, write_running_stats
from lightning_bn.layers.behavior import Behavior, Handle, has_behavior
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers
from lightning_bn.layers.modes import keep_in_eval
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm


def adapt_bn(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    prior_samples: int = 0,
    forward: Forward[Any] | None = None,
    num_samples: int | None = None,
    layers: Layers = None,
    batch_size_fn: BatchSizeFn | None = None,
    progress: bool = False,
) -> Adaptation:
    r"""Replace population statistics by those of another domain, measured on unlabelled batches of it.

    They are measured as `precise_bn` does. With few samples, the stored statistics can serve as a prior (Schneider et
    al., 2020): if they are worth $N$ samples, and $n$ are measured, with $p = N / (N + n)$,

    $$\mu = p\,\mu_{source} + (1 - p)\,\mu_{target}, \qquad
    \sigma^2 = p\,\sigma^2_{source} + (1 - p)\,\sigma^2_{target}.$$

    When it helps: the inputs have shifted and the classes have not (error 40.8 -> 33.1 % at a contrast shift, Table
    4). When it does not: without a shift, with other class frequencies in the target, after training with frozen
    statistics.

    Args:
        model: The model. ``DistributedDataParallel`` is unwrapped.
        batches: Any iterable of unlabelled batches of the target domain; under torch.distributed, each rank's own.
        prior_samples: Number of samples $N$ that the stored statistics are worth; 0 ignores them.
        forward: ``forward(model, batch)`` runs the model on a batch; as for `precise_bn`, like the next three.
        num_samples: Number of samples of all ranks, in whole batches; None takes all.
        layers: Glob patterns over qualified layer names; None adapts every BatchNorm layer that is not frozen.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples in a batch.
        progress: Show a progress bar over samples.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to restore the statistics bit by bit.

    Raises:
        ValueError: As `precise_bn`, and if a chosen layer is adapted already or has a conflicting feature.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> from lightning_bn import adapt_bn
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1)).eval()
        >>> with adapt_bn(model, [torch.tensor([[4.0], [8.0]])], prior_samples=2):
        ...     model[0].running_mean, model[0].running_var
        (tensor([3.]), tensor([2.5000]))
        >>> model[0].running_mean, model[0].running_var
        (tensor([0.]), tensor([1.]))
    """
    check_int("prior_samples", prior_samples, at_least=0)
    check_bool("progress", progress)
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be a function of model and batch but is {forward!r}.")
    config = MeasureConfig(num_samples, "loader", batch_size_fn=batch_size_fn)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    chosen = estimable_layers(model, layers)
    with keep_in_eval(set(model.modules()).difference(chosen.values())):
        run, display = partial(forward or call_model, model), tqdm_progress if progress else None
        statistics = measure(chosen, batches, run, config, of_training=False, progress=display)
    return Adaptation(chosen, statistics, prior_samples)


class Adaptation(Handle):
    """Handle of adapted layers; undoing it restores their statistics.

    Attributes:
        statistics: The measured statistics of the target domain, without the prior.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], statistics: PopulationStatistics, prior_samples: int) -> None:
        check_conflicts(layers, "adapted")
        self.statistics = statistics
        originals, mixed = [], {}
        for name, target in statistics.items():
            layer = layers[name]
            with torch.inference_mode(False):  # a later fit could not restore inference tensors
                buffers = ((key, layer._buffers[key]) for key in OWN_STATISTICS)
                originals.append((layer, {key: b.clone() for key, b in buffers if b is not None}))
            mean, var, _ = statistics_of(layer)
            mean = mix_with_prior(mean.to(target.mean), target.mean, prior_samples, statistics.num_samples)
            var = mix_with_prior(var.to(target.var), target.var, prior_samples, statistics.num_samples)
            mixed[name] = replace(target, mean=mean, var=var)
        write_running_stats(layers, mixed)

        def restore() -> None:
            with torch.no_grad():
                for layer, original in originals:
                    for key, value in original.items():
                        layer.get_buffer(key).copy_(value)  # looked up now: it may have moved to another device

        super().__init__([layers[name] for name in mixed], Adapted(), [restore])


class Adapted(Behavior):
    """Marks layers whose stored statistics are a target domain's."""

    kind = "adapted"
    name = "adapted"

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        return forward(input)


class Adapting(Behavior):
    """In eval mode, normalizes with the statistics of all inputs so far, the current one included. Writes nothing.

    Until there are two values per channel, it uses the stored statistics, as one value has no variance.

    Attributes:
        samples: Samples of the target domain so far, the current batch included; the caller counts them.
        nonfinite: Number of inputs with a NaN or infinite value, which are left out of the statistics.
    """

    kind = "adapted"
    name = "adapting"
    not_copied = (
        "A deep copy of a model that AdaBNCallback(online=True) is adapting is a plain model: it evaluates with the "
        "stored statistics, which are not adapted."
    )

    def __init__(self, layers: Mapping[str, _BatchNorm], prior_samples: int) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self.prior_samples = prior_samples
        self.samples = self.nonfinite = 0
        self._seen: dict[_BatchNorm, tuple[int, Moments]] = {}

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        if layer.training or layer.running_mean is None or has_behavior(layer, "frozen", "batch mode"):
            return forward(input)
        return replace_batch_norm(partial(self._batch_norm, layer), self._names[layer], forward, input)

    def _batch_norm(self, layer: _BatchNorm, call: BatchNormCall) -> Tensor:
        if call.training:
            return call.run()
        x, mean, var = call.input, call.running_mean, call.running_var
        values, seen = self._seen.get(layer) or (0, Moments.empty(x.shape[1], x.device))
        if call.values:
            new = Moments.of(x)
            if torch.stack([new.mean, new.m2]).isfinite().all():
                values, seen = self._seen[layer] = values + call.values, seen + new
            else:
                self.nonfinite += 1  # left out, as it would spoil the statistics of all later inputs
        if values < 2 or mean is None or var is None:
            return call.run()
        mean = mix_with_prior(mean.double(), seen.mean, self.prior_samples, self.samples).to(mean.dtype)
        var = mix_with_prior(var.double(), seen.var, self.prior_samples, self.samples).to(var.dtype)
        return call._replace(running_mean=mean, running_var=var).run()


def mix_with_prior(source: Tensor, target: Tensor, prior_samples: int, samples: int) -> Tensor:
    """Estimate a mean or variance of the target from few samples, with ``source`` as the prior."""
    # Variances are mixed as published. Pooling N and n samples would add p (1 - p) (mean difference)^2, the spread
    # between the populations. But an evaluated batch is from the target alone (docs/callbacks/ada-bn.md).
    if not prior_samples:
        return target
    share = prior_samples / (prior_samples + samples)
    return share * source + (1 - share) * target
