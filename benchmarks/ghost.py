"""Claim: ghosts of a contiguous batch cost what plain BatchNorm costs, because they are a view of it.

Against (a) plain BatchNorm of the whole batch, (b) the loop over groups that everyone writes, and (c) MosaicML
Composer's `GhostBatchNorm`, which is such a loop, where Composer can be imported.
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

TITLE = "Ghost BN costs what plain BatchNorm costs"
CLAIM = (
    "Forward and backward of interleaved ghosts of one size in an NCHW batch take at most 1.15 times as long as those "
    "of plain BatchNorm, and less long than a loop over groups. Other batches have no such view: what they cost is "
    "reported, without a target."
)
GHOST, CHANNELS, PIXELS = 32, 64, 32
THREADS = 2
ROUNDS, QUICK_ROUNDS = 21, 3


@dataclass(frozen=True)
class Case:
    """A batch, how it lies in memory, and how it is grouped."""

    samples: int
    layout: str
    grouping: Grouping

    @property
    def free(self) -> bool:
        """Whether the groups are a view of the batch."""
        return self.layout == "NCHW" and self.grouping == "interleaved" and self.samples % GHOST == 0

    def missed(self, other: str, spread: Spread) -> bool:
        """Whether the median of our time, as a ratio to another's and as it is printed, is over the most it may be."""
        return self.free and round(spread.median, 3) > (1.15 if other == "plain" else 1.0)

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
    """Ghost BN as it is usually written; its running statistics are updated once a group."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        """Normalize runs of samples one after the other."""
        return torch.cat([self.bn(chunk) for chunk in x.split(GHOST)])


def report(device: str, quick: bool) -> str:
    """Measure everything on a device; the table, what was missed, and how it was measured, as Markdown."""
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
            f"{THREADS} CPU threads; forward, and backward to input, weight and bias. The loop, and Composer's, take "
            "runs of samples whatever the groups are. In each round all run one after the other, in rotating order; a "
            "ratio is taken within a round. The median over rounds is given with, in brackets, the quartiles; "
            "**missed** marks a median over 1.15 to plain, or over 1.00 to a loop, where the groups are a view. "
            f"{rounds} rounds; one unmeasured round first.{composer}",
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
