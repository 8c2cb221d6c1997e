"""How many images a model's statistics need: where `precise_bn(tolerance=)` stops, and the error it then has.

The reference are statistics from 10,000 images, the paper's N. An error is *within the noise* if its mean over the
draws lies within two standard deviations of a single estimate from 10,000 images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning_bn as lbn
from recipes.evaluation import copy_of_state, on_its_device, wrong_images
from recipes.images import ImageData

BATCH = 100  # large enough by Table 2
NUM_IMAGES = 10_000
TOLERANCES = (0.1, 0.05, 0.03, 0.02, 0.01)

SECTION = """
## How many images are needed

{table}

`precise_bn(tolerance=)` on up to 10,000 augmented training images in batches of 100; ± is the standard deviation over
{draws} draws. *Within the noise*: the mean error lies within two standard deviations of a single estimate from 10,000
images. A pass takes at least 8 batches, because it measures their spread.
"""


@dataclass(frozen=True)
class Stops:
    """For one model and every tolerance, from large to small: images taken and error (%), by draw."""

    model: str
    reference: Tensor  # errors with all 10,000 images
    at: dict[float, tuple[Tensor, Tensor]]

    def within_noise(self, tolerance: float) -> bool:
        _, errors = self.at[tolerance]
        return abs(float(errors.mean() - self.reference.mean())) <= 2 * float(self.reference.std())

    def as_json(self) -> dict[str, Any]:
        found = [
            {"tolerance": t, "images": n.tolist(), "errors": errors.tolist()} for t, (n, errors) in self.at.items()
        ]
        return {"model": self.model, "reference_errors": self.reference.tolist(), "tolerances": found}


def sweep_tolerances(
    model: nn.Module, data: ImageData, name: str, tolerances: Sequence[float], *, draws: int = 5
) -> Stops:
    """Estimates the model's statistics with every tolerance, and with none; restores the model afterwards."""
    print(f"\nWhere tolerance= stops, of {NUM_IMAGES:,} images in batches of {BATCH}: {name}")
    state = copy_of_state(model)
    validation = data.val_dataloader()

    def estimate(tolerance: float | None) -> tuple[Tensor, Tensor]:
        taken, errors = [], []
        for draw in range(draws):
            images = data.training_sample(NUM_IMAGES, torch.Generator().manual_seed(draw), BATCH)
            model.load_state_dict(state)
            options: dict[str, Any] = {"normalization_batch_size": "loader", "tolerance": tolerance}
            statistics = lbn.precise_bn(model, images, forward=on_its_device, **options)
            taken.append(statistics.num_samples)
            errors.append(100 * wrong_images(model, validation).mean())
        line = f"{sum(taken) / draws:7,.0f} images, validation error {torch.stack(errors).mean():.2f} %"
        print(f"  {'all' if tolerance is None else tolerance:<6} {line}")
        return torch.tensor(taken), torch.stack(errors)

    _, reference = estimate(None)
    stops = Stops(name, reference, {t: estimate(t) for t in sorted(tolerances, reverse=True)})
    model.load_state_dict(state)
    return stops


def tolerance_section(stops: Sequence[Stops]) -> str:
    """Section of a report; empty if nothing was measured."""
    if not stops:
        return ""
    lines = ["| model | tolerance | images taken | of 10,000 | validation error | within the noise |", "|---" * 6 + "|"]
    for of_model in stops:
        lines.append(f"| {of_model.model} | none | {NUM_IMAGES:,} | 100 % | {_mean_and_std(of_model.reference)} | |")
        for tolerance, (taken, errors) in of_model.at.items():
            mean = float(taken.double().mean())
            verdict = "yes" if of_model.within_noise(tolerance) else "**no**"
            cells = (f"{mean:,.0f}", f"{100 * mean / NUM_IMAGES:.0f} %", _mean_and_std(errors), verdict)
            lines.append(f"| | {tolerance:g} | {' | '.join(cells)} |")
    return SECTION.format(table="\n".join(lines), draws=len(stops[0].reference))


def _mean_and_std(errors: Tensor) -> str:
    return f"{errors.mean():.2f} ± {errors.std():.2f}"
