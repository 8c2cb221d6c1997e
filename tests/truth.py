"""The truth about BatchNorm layers: float64 statistics over everything a layer was given, all calls concatenated."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import Moments, PopulationStatistics, find_bn
from lightning_bn.functional.precise import call_model

Calls = dict[str, list[tuple[Tensor, Tensor]]]
"""Qualified layer name -> (input, output) of each call."""


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[Calls]:
    """Record what the BatchNorm layers of ``model`` are given and make of it, by forward hooks."""
    calls: Calls = {}

    def record(name: str) -> Callable[..., None]:
        return lambda layer, args, output: calls.setdefault(name, []).append((args[0].clone(), output.clone()))

    hooks = [layer.register_forward_hook(record(name)) for name, layer in find_bn(model).items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(x: Tensor) -> Tensor:
    """The values of each channel one below the other, in float64."""
    return x.double().movedim(1, -1).reshape(-1, x.shape[1])


def given(calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Everything a layer was given, ``(count, C)`` in float64."""
    return torch.cat([rows_of(x) for x, _ in calls])


def assert_measured(statistics: PopulationStatistics, calls: Calls, sigma: float = 1e-6, var: float = 1e-5) -> None:
    """Statistics are those of what the layers were given.

    A batch's mean is stored in float32 and so may be off by ``r = 2^-22 |mean| / sigma`` standard deviations; the
    variance between batch means inherits that.
    """
    assert set(statistics) == set(calls)
    for name, measured in statistics.items():
        rows = given(calls[name])
        assert measured.count == len(rows) and measured.calls == sum(len(x) > 0 for x, _ in calls[name]), name
        true_mean, true_var = rows.mean(0), rows.var(0, correction=0)
        r = 2**-22 * true_mean.abs() / true_var.sqrt()
        assert ((measured.mean - true_mean).abs() <= (sigma + r) * true_var.sqrt()).all(), name
        assert ((measured.var - true_var).abs() <= (var + 2 * r + r**2) * true_var).all(), name


def assert_stored(model: nn.Module, statistics: PopulationStatistics) -> None:
    """The running statistics of ``model`` are the measured ones, rounded to the buffers' own precision."""
    layers = find_bn(model)
    for name, measured in statistics.items():
        layer = layers[name]
        for buffer, value in ((layer.running_mean, measured.mean), (layer.running_var, measured.var)):
            assert isinstance(buffer, Tensor)
            assert torch.equal(buffer, value.to(buffer.dtype)), name


def in_double(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] = call_model
) -> dict[str, Tensor]:
    """What a float64 copy of ``model`` gives its BatchNorm layers, ``(count, C)`` each.

    Only torch's own layers take part: everything in eval mode, BatchNorm alone in train mode.
    """
    oracle = copy.deepcopy(model).double().eval()
    for layer in oracle.modules():
        if isinstance(layer, _BatchNorm):
            layer.train()
    with recorded(oracle) as calls, torch.no_grad():
        for batch in batches:
            forward(oracle, _double(batch))
    return {name: given(c) for name, c in calls.items()}


def assert_close_to(
    statistics: PopulationStatistics, truth: Mapping[str, Tensor | Moments], sigma: float, var: float
) -> None:
    """Statistics are those of ``truth``, rows or moments, within ``sigma`` deviations and a relative error ``var``."""
    moments = {name: (of.count.amax(), of.mean, of.var) if isinstance(of, Moments)
               else (len(of), of.mean(0), of.var(0, correction=0)) for name, of in truth.items()}  # fmt: skip
    assert set(statistics) == {name for name, (count, *_) in moments.items() if count}
    for name, measured in statistics.items():
        count, true_mean, true_var = moments[name]
        assert measured.count == int(count), name
        assert ((measured.mean - true_mean).abs() <= sigma * true_var.sqrt()).all(), name
        assert ((measured.var - true_var).abs() <= var * true_var).all(), name


def _double(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _double(value) for key, value in batch.items()}
    return type(batch)(_double(part) for part in batch)
