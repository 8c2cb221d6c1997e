"""Claim: a PreciseBN pass takes as long as its forward, because it reads no activation twice.

Against (a) a bare train-mode forward without gradients over the same batches, the least any estimate must do, and
(b) fvcore's `update_bn_stats`, the estimate everyone uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import torchvision
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn

import lightning_bn as lbn
from benchmarks.timing import Spread, ratio, take_turns

TITLE = "The cost of a PreciseBN pass"
CLAIM = (
    "`lightning_bn.precise_bn` takes no longer than a bare train-mode forward without gradients over the same "
    "batches, nor than fvcore's `update_bn_stats`."
)
MAX_RATIO = {"bare": 1.0, "fvcore": 1.0}

NETWORKS = ("resnet50", "mobilenet_v2", "densenet121")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
THREADS = 2


@dataclass(frozen=True)
class Shape:
    """The batches of a pass, and the number of rounds."""

    samples: int
    pixels: int
    batches: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.samples} of {self.pixels} px"


SHAPES = {
    "cpu": (Shape(16, 128, batches=2, rounds=7), Shape(4, 32, batches=32, rounds=7)),
    "cuda": (Shape(32, 224, batches=32, rounds=15), Shape(4, 32, batches=250, rounds=15)),
}
QUICK = (Shape(2, 64, batches=1, rounds=2), Shape(4, 32, batches=2, rounds=2))


@dataclass(frozen=True)
class Row:
    """One network, shape and layout."""

    case: str
    to: dict[str, Spread]
    milliseconds: dict[str, float]

    def missed(self, other: str) -> bool:
        """Whether the printed median is above the target."""
        return round(self.to[other].median, 3) > MAX_RATIO[other]

    def __str__(self) -> str:
        ratios = [f"{spread}{' **missed**' if self.missed(other) else ''}" for other, spread in self.to.items()]
        times = [f"{ms:.1f}" for ms in self.milliseconds.values()]
        return f"| {' | '.join([self.case, *ratios, *times])} |"


def report(device: str, quick: bool) -> str:
    """Measures on a device; returns table, verdicts and method in Markdown."""
    torch.set_num_threads(THREADS)
    shapes = QUICK if quick else SHAPES[device]
    rows = []
    for network, shape, layout in product(NETWORKS, shapes, LAYOUTS):
        rows.append(_measure(network, shape, layout, device))
        print(rows[-1], flush=True)
    cases = "; ".join(f"{s}: {s.batches} batches a pass, {s.rounds} rounds" for s in shapes)
    return "\n".join(
        [
            "| network | batch | layout | pass / bare forward, at most 1.00 | pass / fvcore, at most 1.00 "
            "| bare, ms a batch | pass | fvcore |",
            "|---|---|---|---|---|---|---|---|",
            *map(str, rows),
            "",
            *[_verdict(rows, other) for other in MAX_RATIO],
            "",
            f"**Method.** torchvision networks with random weights on random images, float32, {THREADS} CPU threads. "
            "In each round the three run one after the other, in rotating order; ratios are taken within a round. "
            "Medians over rounds, with quartiles in brackets; **missed** marks a median above the target. Milliseconds "
            f"are medians, for scale only. {cases}, after an unmeasured round.",
        ]
    )


def _measure(network: str, shape: Shape, layout: str, device: str) -> Row:
    torch.manual_seed(0)
    memory_format = LAYOUTS[layout]
    model = getattr(torchvision.models, network)(weights=None).to(device, memory_format=memory_format).train()
    images = torch.randn(shape.batches, shape.samples, 3, shape.pixels, shape.pixels, device=device)
    batches = [batch.contiguous(memory_format=memory_format) for batch in images]
    seconds = take_turns(
        {
            "bare": lambda: _bare_forward(model, batches),
            "pass": lambda: lbn.precise_bn(model, batches, normalization_batch_size="loader"),
            "fvcore": lambda: update_bn_stats(model, batches, len(batches)),
        },
        shape.rounds,
        device,
    )
    return Row(
        f"{network} | {shape} | {layout}",
        {other: ratio(seconds, "pass", other) for other in MAX_RATIO},
        {name: 1000 * Spread.of(values).median / shape.batches for name, values in seconds.items()},
    )


@torch.no_grad()
def _bare_forward(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch)


def _verdict(rows: list[Row], other: str) -> str:
    missed = [row for row in rows if row.missed(other)]
    name = {"bare": "a bare forward", "fvcore": "fvcore"}[other]
    verdict = f"- At most {MAX_RATIO[other]:.2f} times {name}: {len(rows) - len(missed)} of {len(rows)}"
    return verdict + (f"; missed by up to {max(row.to[other].median for row in missed):.3f}." if missed else ".")
