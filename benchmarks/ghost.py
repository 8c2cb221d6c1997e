"""Claim: Ghost BN takes as long as plain BatchNorm if groups are a view of the batch.

Compared with (a) plain BatchNorm of the whole batch, (b) the usual loop over groups, and (c) MosaicML Composer's
`GhostBatchNorm`, which is such a loop, if Composer can be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import lightning_bn as lbn
from benchmarks.timing import Spread, ratio, take_turns
from lightning_bn.functional.ghost import Grouping

TITLE = "The cost of Ghost BN"
CLAIM = (
    "Forward and backward take at most 1.3 times as long as those of plain BatchNorm, 1.15 times if groups are "
    "interleaved, of one size, and in an NCHW batch; and never longer than a loop over contiguous groups."
)
GHOST, CHANNELS, PIXELS = 32, 64, 32
THREADS = 2
ROUNDS, QUICK_ROUNDS = 21, 3


@dataclass(frozen=True)
class Case:
    """A batch, its memory layout and its grouping."""

    samples: int
    layout: str
    grouping: Grouping

    @property
    def free(self) -> bool:
        """Whether the groups are a view of the batch."""
        return self.layout == "NCHW" and self.grouping == "interleaved" and self.samples % GHOST == 0

    def missed(self, other: str, spread: Spread) -> bool:
        """Whether the printed ratio of our time to another's is above the target."""
        return round(spread.median, 3) > (1.0 if other != "plain" else 1.15 if self.free else 1.3)

    def __str__(self) -> str:
        return f"{self.samples} | {self.layout} | {self.grouping}"


LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = (
    Case(256, "NCHW", "interleaved"),
    Case(250, "NCHW", "interleaved"),
    Case(256, "NCHW", "contiguous"),
    Case(256, "channels_last", "interleaved"),
    Case(256, "channels_last", "contiguous"),
)


class Loop(nn.Module):
    """The usual Ghost BN; it updates the running statistics once per group."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes contiguous groups one after the other."""
        return torch.cat([self.bn(chunk) for chunk in x.split(GHOST)])


def report(device: str, quick: bool) -> str:
    """Measures on a device; returns table, verdicts and method in Markdown."""
    torch.set_num_threads(THREADS)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    names = list(_contestants("interleaved", device))
    others = [name for name in names if name != "ghosts"]
    rows = []
    for case in CASES:
        seconds = _measure(case, device, rounds)
        ratios = {other: ratio(seconds, "ghosts", other) for other in others}
        cells = [f"{spread}{' **missed**' if case.missed(other, spread) else ''}" for other, spread in ratios.items()]
        times = [f"{1000 * Spread.of(seconds[name]).median:.1f}" for name in names]
        rows.append(f"| {' | '.join([str(case), *cells, *times])} |")
        print(rows[-1], flush=True)
    composer = "" if "Composer" in names else " Composer could not be imported and was not measured."
    return "\n".join(
        [
            f"| samples | layout | groups | {' | '.join(f'ghosts / {other}' for other in others)} "
            f"| {' | '.join(f'{name}, ms' for name in names)} |",
            "|---" * (3 + len(others) + len(names)) + "|",
            *rows,
            "",
            f"**Method.** One BatchNorm2d of {CHANNELS} channels, {PIXELS} x {PIXELS} px, groups of {GHOST}, float32, "
            f"{THREADS} CPU threads; forward, and backward to input, weight and bias. Both loops use contiguous groups "
            "in all rows. In each round all run one after the other, in rotating order; ratios are taken within a "
            "round. Medians over rounds, with quartiles in brackets. **missed** marks a median above the claim. "
            f" {rounds} rounds, after an unmeasured one.{composer}",
        ]
    )


def _measure(case: Case, device: str, rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    x, upstream = (
        torch.randn(case.samples, CHANNELS, PIXELS, PIXELS, device=device).contiguous(
            memory_format=LAYOUTS[case.layout]
        )
        for _ in range(2)
    )
    x.requires_grad_()

    def step(model: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(model(x), [x, *model.parameters()], upstream)

    models = _contestants(case.grouping, device)
    return take_turns({name: step(model) for name, model in models.items()}, rounds, device)


def _contestants(grouping: Grouping, device: str) -> dict[str, nn.Module]:
    def layer() -> nn.BatchNorm2d:
        return nn.BatchNorm2d(CHANNELS, device=device)

    ghosts = layer()
    lbn.ghost_bn(ghosts, size=GHOST, grouping=grouping)
    models: dict[str, nn.Module] = {"ghosts": ghosts, "plain": layer(), "loop": Loop(layer())}
    if find_spec("composer"):
        from composer.algorithms.ghost_batchnorm.ghost_batchnorm import GhostBatchNorm2d

        models["Composer"] = GhostBatchNorm2d(layer(), GHOST)
    return models
