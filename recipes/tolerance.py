"""How many images a model's statistics need: where `precise_bn(tolerance=)` stops, and what that costs in error.

Held against the same model with the statistics of 10,000 images, the paper's N, over as many draws. The error is
*within the noise* if its mean over the draws lies within two standard deviations of a single estimate from 10,000.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning_bn as lbn
from recipes.evaluation import on_its_device, wrong_images
from recipes.images import ImageData

BATCH = 100  # B of Table 2 that suffices
MOST = 10_000
TOLERANCES = (0.1, 0.05, 0.03, 0.02, 0.01)

SECTION = """
## How many images are needed

{table}

`precise_bn(tolerance=)` on up to 10,000 augmented training images in batches of 100; ± is the standard deviation over
{draws} draws. *Within the noise*: the mean error lies within two standard deviations of a single estimate from 10,000
images. A pass takes at least 8 batches, whose spread it needs.
"""


@dataclass(frozen=True)
class Stops:
    """One model: the images that a pass took and the error (%) afterwards, for every draw.

    `at` is by tolerance, from large to small; `reference` holds the errors with all 10,000 images.
    """

    model: str
    reference: Tensor
    at: dict[float, tuple[Tensor, Tensor]]

    def within_noise(self, tolerance: float) -> bool:
        _, errors = self.at[tolerance]
        return abs(float(errors.mean() - self.reference.mean())) <= 2 * float(self.reference.std())


def sweep_tolerances(
    model: nn.Module,
    data: ImageData,
    name: str,
    tolerances: Sequence[float],
    draws: int = 5,
    say: Callable[[str], None] = print,
) -> Stops:
    """Estimates the model's statistics with every tolerance, and with none; leaves the model as it was."""
    say(f"\nWhere tolerance= stops, of {MOST:,} images in batches of {BATCH}: {name}")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    validation = data.val_dataloader()

    def estimate(tolerance: float | None) -> tuple[Tensor, Tensor]:
        taken, errors = [], []
        for draw in range(draws):
            images = data.training_sample(MOST, torch.Generator().manual_seed(draw), BATCH)
            model.load_state_dict(state)
            statistics = lbn.precise_bn(model, images, forward=on_its_device, tolerance=tolerance)
            taken.append(statistics.num_samples)
            errors.append(100 * wrong_images(model, validation).mean())
        line = f"{sum(taken) / draws:7,.0f} images, validation error {torch.stack(errors).mean():.2f} %"
        say(f"  {'all' if tolerance is None else tolerance:<6} {line}")
        return torch.tensor(taken), torch.stack(errors)

    _, reference = estimate(None)
    found = Stops(name, reference, {t: estimate(t) for t in sorted(tolerances, reverse=True)})
    model.load_state_dict(state)
    return found


def tolerance_section(stops: Sequence[Stops]) -> str:
    """Of a report; empty if nothing was measured."""
    return SECTION.format(table="\n".join(_table(stops)), draws=len(stops[0].reference)) if stops else ""


def _table(stops: Sequence[Stops]) -> list[str]:
    """A row per model and tolerance; the first of each model is the reference."""
    lines = ["| model | tolerance | images taken | of 10,000 | validation error | within the noise |", "|---" * 6 + "|"]
    for found in stops:
        lines.append(f"| {found.model} | none | {MOST:,} | 100 % | {_mean_and_std(found.reference)} | |")
        for tolerance, (taken, errors) in found.at.items():
            mean = float(taken.double().mean())
            verdict = "yes" if found.within_noise(tolerance) else "**no**"
            cells = (f"{mean:,.0f}", f"{100 * mean / MOST:.0f} %", _mean_and_std(errors), verdict)
            lines.append(f"| | {tolerance:g} | {' | '.join(cells)} |")
    return lines


def plain(stops: Sequence[Stops]) -> list[dict[str, Any]]:
    """As JSON holds it."""
    return [
        {
            "model": found.model,
            "reference_errors": found.reference.tolist(),
            "tolerances": [
                {"tolerance": t, "images": taken.tolist(), "errors": errors.tolist()}
                for t, (taken, errors) in found.at.items()
            ],
        }
        for found in stops
    ]


def _mean_and_std(errors: Tensor) -> str:
    return f"{errors.mean():.2f} ± {errors.std():.2f}"
