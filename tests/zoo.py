"""The zoo: one small model, with batches, for each kind of BatchNorm layer and use of it that is out there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, list[Tensor]]


def cnn(first: nn.Module | None = None, dropout: float = 0.5) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU, dropout, and the same again; ``first`` takes the place of the first BatchNorm."""
    begin = [nn.Conv2d(3, 8, 3, padding=1), first or nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*begin, nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU())


def images(*sizes: int, mean: float = 0.0, pixels: int = 8) -> list[Tensor]:
    """Batches of these sizes; within a batch the images are alike, so that batches differ in mean and variance."""
    batches = [torch.randn(n, 3, pixels, pixels) * (1 + torch.rand(1)) + torch.randn(3, 1, 1) for n in sizes]
    return [batch + mean for batch in batches]


class Shared(nn.Module):
    """One BatchNorm called on two feature maps of different size, as in a RetinaNet head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        large = self.bn(self.conv(x))
        small = self.bn(self.conv(x[..., ::2, ::2]) + 1)
        return large.mean() + small.mean()


def _shifted(model: nn.Module, mean: float) -> nn.Module:
    """The inputs of every BatchNorm moved by a bias, as far as the model has one in front."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.constant_(layer.bias, mean)
    return model


def trained(model: nn.Module, affine: bool = True) -> Any:
    """Scales, shifts and stored statistics that are not the identity."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for parameter in layer.parameters() if affine else ():
                nn.init.uniform_(parameter, 0.5, 1.5)
            if layer.running_mean is not None and layer.running_var is not None:
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def _layers_in_float32(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.float()
    return model


class _Mixed(nn.Module):
    """A float64 layer behind a float32 one."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.double_ = nn.BatchNorm2d(3), nn.BatchNorm2d(3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.double_(self.single(x.to(self.single.weight.dtype)).double())


def _lazy() -> nn.Module:
    model = cnn(nn.LazyBatchNorm2d())
    model.eval()(torch.zeros(1, 3, 8, 8))
    return model.train()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4), nn.BatchNorm1d(4))


def _to(model: nn.Module, batches: list[Tensor], *to: torch.dtype, **layout: torch.memory_format) -> Case:
    return model.to(*to, **layout), [x.to(*to, **layout) for x in batches]


def _mobilenet() -> nn.Module:
    import timm  # here: not all processes that import this need it, and it takes seconds

    return timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=3).train()


def _without_bias() -> nn.Module:
    model = cnn()
    model[1].bias = None
    return model


CASES: dict[str, Callable[[], Case]] = {
    "ragged batches": lambda: (cnn(), images(8, 8, 3, 1)),
    "mean 1e4 std 1": lambda: (_shifted(cnn(), 1e4), images(8, 8, 3)),
    "channels_last": lambda: _to(cnn(), images(8, 5), memory_format=torch.channels_last),
    "channels_last, mean 1e4 std 1": lambda: _to(_shifted(cnn(), 1e4), images(8, 5), memory_format=torch.channels_last),
    "called several times": lambda: (Shared(), images(8, 4)),
    "BatchNorm1d, rows": lambda: (_mlp(), [torch.randn(n, 6) * 3 + 2 for n in (40, 40, 7)]),
    "BatchNorm1d, rows, mean 1e4 std 1": lambda: (
        _shifted(_mlp(), 1e4),
        [torch.randn(n, 6) * 3 + 2 for n in (40, 40, 7)],
    ),
    "BatchNorm1d, sequences": lambda: (
        nn.Sequential(nn.Conv1d(6, 9, 3), nn.BatchNorm1d(9), nn.ReLU()),
        [torch.randn(n, 6, 20) for n in (8, 2)],
    ),
    "BatchNorm3d": lambda: (
        nn.Sequential(nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5), nn.ReLU(), nn.Conv3d(5, 3, 1), nn.BatchNorm3d(3)),
        [torch.randn(n, 2, 6, 6, 6) for n in (3, 1)],
    ),
    "SyncBatchNorm in one process": lambda: (nn.SyncBatchNorm.convert_sync_batchnorm(cnn()), images(8, 3)),
    "timm BatchNormAct2d": lambda: (_mobilenet(), images(6, 4, pixels=32)),
    "bf16 model": lambda: _to(cnn(), images(8, 5), torch.bfloat16),
    "bf16 model, mean 100": lambda: _to(_shifted(cnn(), 100), images(8, 5), torch.bfloat16),
    "bf16 model, channels_last": lambda: _to(
        cnn(), images(8, 5, mean=3), torch.bfloat16, memory_format=torch.channels_last
    ),
    "fp16 model": lambda: _to(cnn(), images(8, 5), torch.float16),
    "bf16 model with float32 layers": lambda: (
        _layers_in_float32(cnn().bfloat16()),
        [x.bfloat16() for x in images(8, 5)],
    ),
    "float32 and float64 layers": lambda: (_Mixed(), images(8, 5)),
    "float64 model": lambda: _to(cnn(), images(8, 5), torch.float64),
    "no affine": lambda: (cnn(nn.BatchNorm2d(8, affine=False)), images(8, 5)),
    "no bias": lambda: (_without_bias(), images(8, 5)),
    "momentum None": lambda: (cnn(nn.BatchNorm2d(8, momentum=None)), images(8, 5)),
    "lazy layer that has seen data": lambda: (_lazy(), images(8, 5)),
    "one value per channel": lambda: (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), [*torch.randn(3, 1, 3)]),
}


def case(name: str) -> Case:
    """A model of the zoo in train mode with stored statistics of its own, and batches for it."""
    model, batches = CASES[name]()
    return trained(model), batches
