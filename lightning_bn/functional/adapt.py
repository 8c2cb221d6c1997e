"""AdaBN: population statistics of the domain that is evaluated (paper, Sec. 5.1)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.core.batch_sizes import BatchSizeFn
from lightning_bn.core.checks import check_bool, check_int
from lightning_bn.core.moments import Moments
from lightning_bn.core.population import LayerStatistics, PopulationStatistics
from lightning_bn.functional.measure import MeasureConfig, measure
from lightning_bn.functional.precise import Forward, call_model, estimable_layers, tqdm_progress, write_running_stats
from lightning_bn.layers.behavior import Behavior, Handle, has_behavior
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers
from lightning_bn.layers.modes import keep_in_eval
from lightning_bn.layers.override import BatchNormCall, replace_batch_norm

_STATISTICS = ("running_mean", "running_var")


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

    They are measured as `precise_bn` does. With few samples, the stored statistics can serve as a prior that is worth
    ``prior_samples`` samples (Schneider et al., 2020): of $N$ prior and $n$ measured samples, with $p = N / (N + n)$,

    $$\mu = p\,\mu_{source} + (1 - p)\,\mu_{target}, \qquad
    \sigma^2 = p\,\sigma^2_{source} + (1 - p)\,\sigma^2_{target}.$$

    When it helps: the inputs have shifted and the classes have not (error 40.8 -> 33.1 % at a contrast shift, Table
    4). When it does not: without a shift, with other class frequencies in the target, and after training with
    frozen statistics.

    Args:
        model: The model. ``DistributedDataParallel`` is unwrapped.
        batches: Any iterable of batches of the target domain; labels are not used. Under torch.distributed every rank
            calls this, each with its own batches, in any number; all get the same statistics.
        prior_samples: Number of samples that the stored statistics are worth; 0 ignores them.
        forward: ``forward(model, batch)`` runs the model on a batch; as for `precise_bn`, like the next three.
        num_samples: Number of samples of all ranks, in whole batches; None takes all.
        layers: Glob patterns over qualified layer names; None adapts every BatchNorm layer that is not frozen.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples in a batch.
        progress: Show a progress bar over samples.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to restore the statistics bit by bit. Its
        ``statistics`` are the measured ones.

    Raises:
        ValueError: As `precise_bn`, and if a chosen layer is adapted already or has a conflicting feature; the layers
            then keep their statistics.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bn import adapt_bn
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
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
        run, display = functools.partial(forward or call_model, model), tqdm_progress if progress else None
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
        reached = {name: layers[name] for name in statistics}
        with torch.inference_mode(False):  # a later fit could not restore inference tensors
            originals = [
                (layer, key, stored.clone())
                for layer in reached.values()
                for key in (*_STATISTICS, "num_batches_tracked")
                if (stored := layer._buffers[key]) is not None  # a layer may count no batches
            ]
        mixed = {name: _with_prior(layer, statistics, name, prior_samples) for name, layer in reached.items()}
        write_running_stats(reached, mixed)
        super().__init__(reached.values(), Adapted(), [lambda: _restore(originals)])


class Adapted(Behavior):
    """Marks layers whose stored statistics are a target domain's."""

    kind = "adapted"
    name = "adapted"

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        return forward(input)


class Adapting(Behavior):
    """In eval mode, normalizes with the statistics of all inputs so far, the current one included. Writes nothing.

    Until there are two values per channel, it uses the stored statistics, as one value has no variance.

    Args:
        layers: Qualified name -> layer.
        prior_samples: Number of samples that the stored statistics are worth.

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

        def batch_norm(call: BatchNormCall) -> Tensor:
            return call.run() if call.training else self._normalize(layer, call)

        return replace_batch_norm(batch_norm, self._names[layer], forward, input)

    def _normalize(self, layer: _BatchNorm, call: BatchNormCall) -> Tensor:
        if call.values:
            self._add(layer, call)
        num_values, moments = self._seen.get(layer, (0, None))
        if moments is None or num_values < 2 or call.running_mean is None or call.running_var is None:
            return call.run()
        mean, var = (
            mix_with_prior(source.double(), target, self.prior_samples, self.samples).to(source.dtype)
            for source, target in ((call.running_mean, moments.mean), (call.running_var, moments.var))
        )
        return call._replace(running_mean=mean, running_var=var).run()

    def _add(self, layer: _BatchNorm, call: BatchNormCall) -> None:
        moments = Moments.of(call.input)
        if not torch.stack([moments.mean, moments.m2]).isfinite().all():
            self.nonfinite += 1  # left out, as it would spoil the statistics of all later inputs
            return
        num_values, before = self._seen.get(layer, (0, None))
        self._seen[layer] = num_values + call.values, moments if before is None else before + moments


def mix_with_prior(source: Tensor, target: Tensor, prior_samples: int, samples: int) -> Tensor:
    """Estimate a mean or variance of the target from few samples, with ``source`` as the prior.

    Example:
        >>> import torch
        >>> mix_with_prior(torch.tensor([0.0]), torch.tensor([4.0]), prior_samples=3, samples=1)
        tensor([1.])
    """
    # Variances are mixed as published. Pooling N and n samples would add p (1 - p) (mean difference)^2, the spread
    # between the populations. But an evaluated batch is from the target alone (docs/callbacks/ada-bn.md).
    if not prior_samples:
        return target
    share = prior_samples / (prior_samples + samples)
    return share * source + (1 - share) * target


def _with_prior(layer: _BatchNorm, measured: PopulationStatistics, name: str, prior_samples: int) -> LayerStatistics:
    target, samples = measured[name], measured.num_samples
    mean, var = (
        mix_with_prior(layer.get_buffer(key).to(value), value, prior_samples, samples)
        for key, value in zip(_STATISTICS, (target.mean, target.var), strict=True)
    )
    return replace(target, mean=mean, var=var)


def _restore(originals: list[tuple[_BatchNorm, str, Tensor]]) -> None:
    with torch.no_grad():
        for layer, key, original in originals:
            layer.get_buffer(key).copy_(original)  # looked up now: the layer may have moved to another device
