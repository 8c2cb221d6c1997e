"""Claim: the statistics of all samples as one batch take little longer than one pass, for any size of batches.

Compared with the one-pass estimate, the paper's layer-by-layer algorithm (App. A.3) and other packages: the error
against a float64 forward of all samples as one batch, and the time.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torchvision
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import lightning_bn as lbn
from benchmarks.timing import Spread, ratio, take_turns, wait_for
from lightning_bn.core.gaps import mean_gap, var_gap
from tests.layer_by_layer import layer_by_layer

TITLE = "The cost of exact population statistics"
MAX_TIME = {"micro-batches": 1.3, "a single one": 1.1}
MIN_SPEEDUP = 10.0
CLAIM = (
    '`precise_bn(normalization_batch_size="population")`, which is exact, takes at micro-batches of 2 to 32 at most '
    f"{MAX_TIME['micro-batches']} times as long as one pass, at most {MAX_TIME['a single one']} times if there is a "
    f"single one. It is at least {MIN_SPEEDUP:.0f} times faster than the paper's layer-by-layer algorithm on ResNet-50."
)
THREADS = 2
Batches = list[Tensor]
Truth = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """A network, its images, and the number of rounds."""

    network: str
    samples: int
    pixels: int
    micro_batches: tuple[int, ...]
    rounds: int

    def __str__(self) -> str:
        return f"{self.network}, {self.samples} images of {self.pixels} px"


SETTINGS = {
    "cpu": (Setting("resnet50", 128, 32, (2, 32, 128), 5), Setting("mobilenet_v2", 128, 64, (2, 32, 128), 5)),
    "cuda": (Setting("resnet50", 512, 224, (2, 8, 32, 128), 5),),
}
QUICK = (Setting("resnet50", 8, 32, (2, 8), 2), Setting("mobilenet_v2", 8, 32, (2,), 2))


def _precise(**kwargs: Any) -> Callable[[nn.Module, Batches], object]:
    return lambda model, batches: lbn.precise_bn(model, batches, **{"normalization_batch_size": "loader", **kwargs})


def _fvcore(model: nn.Module, batches: Batches) -> None:
    update_bn_stats(model, batches, len(batches))


@torch.no_grad()
def _mean_of_variances(model: nn.Module, batches: Batches) -> None:
    """Averages the means and the variances of batches, as pycls does."""
    layers = list(lbn.find_bn(model).values())
    momenta = [layer.momentum for layer in layers]
    sums = [[torch.zeros_like(buffer) for buffer in _statistics(layer)] for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    for batch in batches:
        model(batch)
        for layer, total in zip(layers, sums, strict=True):
            for sum_, buffer in zip(total, _statistics(layer), strict=True):
                sum_ += buffer / len(batches)
    for layer, total, momentum in zip(layers, sums, momenta, strict=True):
        layer.momentum = momentum
        for mean, buffer in zip(total, _statistics(layer), strict=True):
            buffer.copy_(mean)


def _layer_by_layer(model: nn.Module, batches: Batches) -> None:
    layers = lbn.find_bn(model)
    for name, moments in layer_by_layer(model, batches).items():
        for buffer, value in zip(_statistics(layers[name]), (moments.mean, moments.var), strict=True):
            buffer.copy_(value)


ESTIMATES: dict[str, Callable[[nn.Module, Batches], object]] = {
    "one pass": _precise(),
    "B = 128": _precise(normalization_batch_size=128),
    "exact": _precise(normalization_batch_size="population"),
    "fvcore": _fvcore,
    "swa_utils.update_bn": lambda model, batches: update_bn(batches, model),
    "mean of variances (pycls)": _mean_of_variances,
}


@dataclass(frozen=True)
class Row:
    """One estimate from micro-batches of one size: the worst layer's gaps to the truth, and its time / one pass."""

    setting: Setting
    micro_batch: int
    estimate: str
    gaps: tuple[float, float]
    to_one_pass: Spread

    @property
    def max_time(self) -> float:
        return MAX_TIME["a single one" if self.micro_batch == self.setting.samples else "micro-batches"]

    @property
    def missed(self) -> bool:
        """Whether the claim is about this row, and is false."""
        return self.estimate == "exact" and round(self.to_one_pass.median, 3) > self.max_time

    def __str__(self) -> str:
        mean, var = self.gaps
        times = f"{self.to_one_pass}{' **missed**' if self.missed else ''}"
        return f"| {self.setting} | {self.micro_batch} | {self.estimate} | {mean:.1e} | {var:.1e} | {times} |"


def report(device: str, quick: bool) -> str:
    """Measures on a device; returns table, verdicts and method in Markdown."""
    torch.set_num_threads(THREADS)
    settings = QUICK if quick else SETTINGS[device]
    rows: list[Row] = []
    for setting in settings:
        torch.manual_seed(0)
        model = getattr(torchvision.models, setting.network)(weights=None).to(device).train()
        x = torch.randn(setting.samples, 3, setting.pixels, setting.pixels)
        x = (x * (1 + torch.rand(setting.samples, 1, 1, 1)) + torch.randn(setting.samples, 3, 1, 1)).to(device)
        truth = _truth(model, x)
        for micro_batch in setting.micro_batches:
            for row in _measure(setting, model, list(x.split(micro_batch)), truth, device):
                rows.append(row)
                print(row, flush=True)
    return "\n".join(
        [
            "| network | micro-batch | estimate | mean gap to the truth | variance gap | time / one pass |",
            "|---|---|---|---|---|---|",
            *map(str, rows),
            "",
            *_verdicts(rows),
            "",
            "**Method.** torchvision networks with random weights on random images of different brightness and "
            f"contrast, float32, {THREADS} CPU threads. The truth are the statistics of the layers' inputs in a "
            "float64 "
            "forward of all images as one batch. A gap is that of the worst layer: the rms over channels of the mean's "
            "error in sigma, and of the log of the ratio of variances. Estimates take turns in every round, in "
            "rotating "
            "order. Times are medians of the ratios within a round, with quartiles in brackets "
            f"({', '.join(str(s.rounds) for s in settings)} rounds). Layer by layer is timed once, with one pass timed "
            "next to it. Each of its forwards ends at the layer in question, which halves its time.",
        ]
    )


def _measure(setting: Setting, model: nn.Module, batches: Batches, truth: Truth, device: str) -> list[Row]:
    seconds = take_turns(
        {name: functools.partial(estimate, model, batches) for name, estimate in ESTIMATES.items()},
        setting.rounds,
        device,
    )

    def row(name: str, to_one_pass: Spread) -> Row:
        return Row(setting, len(batches[0]), name, _worst(model, truth), to_one_pass)

    rows = []
    for name, estimate in ESTIMATES.items():
        estimate(model, batches)
        rows.append(row(name, ratio(seconds, name, "one pass")))
    if setting.network == "resnet50":
        fast, slow = (_seconds(e, model, batches, device) for e in (ESTIMATES["one pass"], _layer_by_layer))
        rows.append(row("layer by layer", Spread(*[slow / fast] * 3)))
    return rows


def _worst(model: nn.Module, truth: Truth) -> tuple[float, float]:
    """Largest mean gap and variance gap of a model's running statistics."""
    gaps = []
    for name, layer in lbn.find_bn(model).items():
        (mean, var), (true_mean, true_var) = (v.double() for v in _statistics(layer)), truth[name]
        gaps.append((float(mean_gap(mean, true_mean, true_var)), float(var_gap(var, true_var))))
    worst = [max(gap) for gap in zip(*gaps, strict=True)]
    return worst[0], worst[1]


@torch.no_grad()
def _truth(model: nn.Module, x: Tensor) -> Truth:
    """Mean and biased variance of every layer's inputs in a float64 forward of all images as one batch."""
    model = copy.deepcopy(model).double()
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def before_forward(layer: nn.Module, args: tuple[Tensor]) -> None:
            var, mean = torch.var_mean(args[0], (0, 2, 3), correction=0)
            found[name] = mean, var

        return before_forward

    for name, layer in lbn.find_bn(model).items():
        layer.register_forward_pre_hook(measure(name))
    model(x.double())
    return found


def _seconds(
    estimate: Callable[[nn.Module, Batches], object], model: nn.Module, batches: Batches, device: str
) -> float:
    wait_for(device)
    started = time.perf_counter()
    estimate(model, batches)
    wait_for(device)
    return time.perf_counter() - started


def _statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    mean, var = layer.running_mean, layer.running_var
    assert isinstance(mean, Tensor) and isinstance(var, Tensor)
    return mean, var


def _verdicts(rows: list[Row]) -> list[str]:
    claimed = [row for row in rows if row.estimate == "exact"]
    met = sum(not row.missed for row in claimed)
    most = max(row.to_one_pass.median for row in claimed)
    first = f"- Within these times: {met} of {len(claimed)}; at most {most:.2f} passes."
    exact = {(r.setting, r.micro_batch): r.to_one_pass.median for r in claimed}
    faster = [
        row.to_one_pass.median / exact[row.setting, row.micro_batch]
        for row, claim in product(rows, claimed)
        if row.estimate == "layer by layer" and (row.setting, row.micro_batch) == (claim.setting, claim.micro_batch)
    ]
    fast = sum(times >= MIN_SPEEDUP for times in faster)
    share = f"{fast} of {len(faster)}"
    second = f"- At least {MIN_SPEEDUP:.0f} times faster than layer by layer: {share}; {min(faster):.0f} at least."
    return [first, second]
