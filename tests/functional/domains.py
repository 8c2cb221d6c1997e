"""References for domain-specific BN: torchvision's heads, and each row of Table 5 written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead

CHANNELS = 4
LEVEL_MODULES = ["classification_head", "regression_head"]
ROWS = {
    1: ("shared", "shared", "shared"),
    2: ("shared", "domain", "shared"),
    3: ("domain", "shared", "shared"),
    4: ("domain", "domain", "shared"),
    5: ("domain", "shared", "domain"),
    6: ("domain", "domain", "domain"),
}
"""Table 5: what SGD, population statistics and affine are."""
EVERY = {**ROWS, 7: ("shared", "shared", "domain"), 8: ("shared", "domain", "domain")}
"""And the two that it leaves out."""
CONSISTENT = (1, 4, 6)


def choices(row: int) -> dict[str, Any]:
    return dict(zip(("train_statistics", "population_statistics", "affine"), EVERY[row], strict=True))


def retinanet_head() -> RetinaNetHead:
    return _with_large_weights(RetinaNetHead(CHANNELS, 2, 3, norm_layer=nn.BatchNorm2d))


def fcos_head() -> FCOSHead:
    head = FCOSHead(32, 2, 3)  # its own GroupNorm wants 32 channels
    kwargs = {"num_convs": 2, "norm_layer": nn.BatchNorm2d}
    head.classification_head = FCOSClassificationHead(CHANNELS, 2, 3, **kwargs)
    head.regression_head = FCOSRegressionHead(CHANNELS, 2, **kwargs)
    return _with_large_weights(head)


HEADS: dict[str, Callable[[], nn.Module]] = {"RetinaNet": retinanet_head, "FCOS": fcos_head}


def _with_large_weights(head: nn.Module) -> Any:
    """In float64, with random weights and statistics."""
    torch.manual_seed(0)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
            layer.running_var.uniform_(0.5, 2)
    return head.double().train()


def levels(samples: int = 2, number: int = 3, seed: int = 0) -> list[Tensor]:
    """A feature pyramid whose levels differ."""
    own = torch.Generator().manual_seed(seed)
    sizes = [8, 4, 2, 1, 1][:number]
    return [
        torch.randn(samples, CHANNELS, s, s + 1, generator=own, dtype=torch.float64) * (i + 1) + i
        for i, s in enumerate(sizes)
    ]


def outputs_and_gradients(run: Callable[[list[Tensor]], Any], model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """What a head makes of its inputs, and the gradients of inputs and parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = run(inputs)
    found = list(outputs.values()) if isinstance(outputs, dict) else list(outputs)
    weights = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=weights, dtype=o.dtype)).sum() for o in found)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [*found, *torch.autograd.grad(loss, [*inputs, *parameters])]


class ByHand:
    """A tower run layer by layer over all levels, with its BatchNorm written out for a row of the table.

    The affine of domains, and statistics of domains, are kept here.
    """

    def __init__(self, tower: nn.Module, row: int, number: int) -> None:
        self.sgd, self.population, self.affine = EVERY[row]
        self.modules = [m for m in tower.modules() if not list(m.children())]
        layers = [m for m in self.modules if isinstance(m, nn.BatchNorm2d)]
        self.means = {m: m.running_mean.expand(number, -1).clone() for m in layers}
        self.variances = {m: m.running_var.expand(number, -1).clone() for m in layers}

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        for m in self.modules:
            inputs = self.normalized(m, inputs) if isinstance(m, nn.BatchNorm2d) else [m(x) for x in inputs]
        return inputs

    def normalized(self, bn: nn.BatchNorm2d, inputs: list[Tensor]) -> list[Tensor]:
        rows = [x.movedim(1, -1).flatten(0, -2) for x in inputs]
        if bn.training:
            apart = [F.batch_norm(r, None, None, None, None, True) for r in rows]
            together = F.batch_norm(torch.cat(rows), None, None, None, None, True).split([len(r) for r in rows])
            normal = apart if self.sgd == "domain" else together
            for d, r in enumerate(rows):
                self.means[bn][d].lerp_(r.detach().mean(0), 0.1)
                self.variances[bn][d].lerp_(r.detach().var(0), 0.1)
            bn.running_mean.lerp_(torch.cat(rows).detach().mean(0), 0.1)
            bn.running_var.lerp_(torch.cat(rows).detach().var(0), 0.1)
        else:
            own = self.population == "domain"
            mean = self.means[bn] if own else bn.running_mean.expand(len(rows), -1)
            var = self.variances[bn] if own else bn.running_var.expand(len(rows), -1)
            normal = [(r - mean[d]) / (var[d] + bn.eps).sqrt() for d, r in enumerate(rows)]
        weights = getattr(bn, "domain_weight", None)
        biases = getattr(bn, "domain_bias", None)
        weights = bn.weight.expand(len(rows), -1) if weights is None else weights
        biases = bn.bias.expand(len(rows), -1) if biases is None else biases
        normal = [n * weights[d] + biases[d] for d, n in enumerate(normal)]
        return [n.view(len(x), *x.shape[2:], -1).movedim(-1, 1) for n, x in zip(normal, inputs, strict=True)]


class Unrolled(nn.Module):
    """A copy of a head whose owners run their tower by hand, before their own loop asks for it."""

    def __init__(self, head: nn.Module, row: int, number: int) -> None:
        super().__init__()
        self.head = copy.deepcopy(head)
        self.by_hand: dict[str, ByHand] = {}
        for name in LEVEL_MODULES:
            tower = self.head.get_submodule(name).conv
            self.by_hand[name] = ByHand(tower, row, number)

    def forward(self, inputs: list[Tensor]) -> Any:
        for name, by_hand in self.by_hand.items():
            owner = self.head.get_submodule(name)
            results = by_hand(inputs)
            answers = {id(x): r for x, r in zip(inputs, results, strict=True)}
            owner.conv.forward = lambda x, answers=answers: answers[id(x)]
        return self.head(inputs)
