"""References for domain-specific BN: torchvision's heads, and each row of Table 5 written out by hand."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead

from lightning_bn import domain_bn

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


def add_domains(model: nn.Module, row: int, **options: Any) -> Any:
    """Without the warning of inconsistent rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return domain_bn(model, **{"num_domains": 3, **choices(row), **options})


def retinanet_head() -> RetinaNetHead:
    return _with_large_weights(RetinaNetHead(CHANNELS, 2, 3, norm_layer=nn.BatchNorm2d))


def fcos_head() -> FCOSHead:
    head = FCOSHead(32, 2, 3)  # its own GroupNorm wants 32 channels
    kwargs: dict[str, Any] = {"num_convs": 2, "norm_layer": nn.BatchNorm2d}
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


class ReferenceBN:
    """BatchNorm with domains as in a row of Table 5, written out, on one tensor ``(n, C)`` per domain."""

    def __init__(self, model: nn.Module, row: int, number: int) -> None:
        self.train, self.population, self.affine = EVERY[row]
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.running = {m: (m.running_mean.clone(), m.running_var.clone()) for m in layers}
        self.means = {m: m.running_mean.expand(number, -1).clone() for m in layers}
        self.variances = {m: m.running_var.expand(number, -1).clone() for m in layers}

    def __call__(self, bn: nn.BatchNorm2d, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        whole, outputs = torch.cat(list(rows.values())), {}
        for d, x in rows.items():
            if bn.training:
                source = x if self.train == "domain" else whole
                mean, var = source.mean(0), source.var(0, correction=0)
                self._update(self.means[bn][d], self.variances[bn][d], x)
            elif self.population == "domain":
                mean, var = self.means[bn][d], self.variances[bn][d]
            else:
                mean, var = self.running[bn]
            weight, bias = (bn.weight, bn.bias) if self.affine == "shared" else (bn.domain_weight[d], bn.domain_bias[d])
            outputs[d] = (x - mean) / (var + bn.eps).sqrt() * weight + bias
        if bn.training:
            self._update(*self.running[bn], whole)
        return outputs

    @staticmethod
    def _update(mean: Tensor, var: Tensor, x: Tensor) -> None:
        mean.lerp_(x.detach().mean(0), 0.1)
        var.lerp_(x.detach().var(0), 0.1)


def as_rows(x: Tensor) -> Tensor:
    """``(N, C, ...)`` -> ``(n, C)``."""
    return x.movedim(1, -1).flatten(0, -2)


def as_images(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(len(like), *like.shape[2:], -1).movedim(-1, 1)


class Unrolled(nn.Module):
    """A copy of a head whose towers run layer by layer over all levels, before the head calls them."""

    def __init__(self, head: nn.Module, row: int, number: int) -> None:
        super().__init__()
        self.head = copy.deepcopy(head)
        self.bn, self.inputs = ReferenceBN(self.head, row, number), dict[str, list[Tensor]]()

    def forward(self, inputs: list[Tensor]) -> Any:
        for name in LEVEL_MODULES:
            tower, x = self.head.get_submodule(name).conv, inputs
            for inner, m in ((inner, m) for inner, m in tower.named_modules() if not list(m.children())):
                if isinstance(m, nn.BatchNorm2d):
                    given = self.inputs[f"{name}.conv.{inner}"] = [as_rows(level) for level in x]
                    rows = self.bn(m, dict(enumerate(given)))
                    x = [as_images(rows[d], level) for d, level in enumerate(x)]
                else:
                    x = [m(level) for level in x]
            results = {id(level): result for level, result in zip(inputs, x, strict=True)}
            tower.forward = lambda level, results=results: results[id(level)]
        return self.head(inputs)
