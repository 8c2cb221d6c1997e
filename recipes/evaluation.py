"""Errors of a fixed model on the validation images, image by image, so that two can be compared in pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


@torch.no_grad()
def wrong_images(model: nn.Module, batches: DataLoader[tuple[Tensor, Tensor]]) -> Tensor:
    """1.0 for every image that the model gets wrong with the running statistics it has now, else 0.0."""
    model.eval()
    wrong = [on_its_device(model, batch).argmax(1).cpu() != batch[1] for batch in batches]
    return torch.cat(wrong).double()


def on_its_device(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    logits: Tensor = model(batch[0].to(next(model.parameters()).device))
    return logits


def mean_and_spread(*wrong: Tensor) -> str:
    """Error in percent, mean ± standard deviation over draws; `wrong` is (draws, images), one a seed.

    With several seeds it is their mean, and the spread is that of the draws within a seed.
    """
    errors = 100 * torch.stack([one_seed.mean(1) for one_seed in wrong])
    spread = f" ± {errors.var(1).mean().sqrt():.1f}" if errors.shape[1] > 1 else ""
    return f"{errors.mean():.1f}{spread}"
