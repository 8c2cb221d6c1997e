"""The paper's exact algorithm (App. A.3), as the oracle of what lockstep computes: one layer at a time.

To estimate a layer, every batch is run as far as it: layers before it normalize with the statistics that were found for
them, and what it is given is measured. So each batch is run once for every layer. A layer that is called several times
in a forward normalizes each call with that call's statistics, as it does in training, and stores those of all.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn import Moments, find_bn
from lightning_bn.functional.precise import call_model


class _FarEnough(Exception):
    """The layer that is measured was reached."""


def layer_by_layer(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] = call_model,
    layers: Sequence[str] | None = None,
) -> dict[str, Moments]:
    """What each of ``layers`` is given when all batches are normalized together; the others use what they store."""
    model = copy.deepcopy(model).eval()
    found: list[tuple[str, Moments]] = []
    here: list[Moments] = []
    calls, last = 0, ""

    def on_call(name: str) -> Callable[[Any, tuple[Tensor]], None]:
        def before_forward(layer: Any, args: tuple[Tensor]) -> None:
            nonlocal calls, last
            if calls == len(found):
                last = name
                here.append(_moments(args[0]))
                raise _FarEnough
            assert found[calls][0] == name, "batches reach the layers in one order"
            layer.running_mean.copy_(found[calls][1].mean)
            layer.running_var.copy_(found[calls][1].var)
            calls += 1

        return before_forward

    for name, layer in find_bn(model, layers).items():
        layer.register_forward_pre_hook(on_call(name))
    with torch.no_grad():
        while True:
            last = ""
            for batch in batches:
                calls = 0
                try:
                    forward(model, batch)
                except _FarEnough:
                    continue
            if not here:
                break
            found.append((last, sum(here[1:], here[0])))
            here.clear()
    together: dict[str, Moments] = {}
    for name, moments in found:
        together[name] = together[name] + moments if name in together else moments
    return together


def _moments(x: Tensor) -> Moments:
    dims = [0, *range(2, x.ndim)]
    count = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device)
    if not x.numel():
        return Moments.empty(x.shape[1], x.device)
    var, mean = torch.var_mean(x.double(), dims, correction=0)
    return Moments(count, mean, var * count)
