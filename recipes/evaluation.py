"""Evaluates a fixed model on images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


@torch.no_grad()
def wrong_images(model: nn.Module, batches: DataLoader[tuple[Tensor, Tensor]]) -> Tensor:
    """1.0 for each image that the model classifies wrongly with its running statistics, else 0.0."""
    model.eval()
    wrong = [on_its_device(model, batch).argmax(1).cpu() != batch[1] for batch in batches]
    return torch.cat(wrong).double()


def on_its_device(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    logits: Tensor = model(batch[0].to(next(model.parameters()).device))
    return logits


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def mean_and_spread(*wrong: Tensor) -> str:
    """Error in percent, mean ± standard deviation over draws; `wrong` is (draws, images), one per seed.

    With several seeds, the mean is over all of them, and the spread is that of the draws within a seed.
    """
    errors = 100 * torch.stack([one_seed.mean(1) for one_seed in wrong])
    spread = f" ± {errors.var(1).mean().sqrt():.1f}" if errors.shape[1] > 1 else ""
    return f"{errors.mean():.1f}{spread}"
