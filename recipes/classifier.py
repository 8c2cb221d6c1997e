"""The recipes' network and training: a ResNet-8 (9 BN layers), SGD with momentum, cosine learning rate."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with BN, added to their input, which a 1x1 convolution brings into shape."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet8(nn.Module):
    """Three blocks behind a stem that halves the image, made for images of about 30 pixels."""

    def __init__(self, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Block(width, width, stride=1)
        self.block2 = Block(width, 2 * width, stride=2)
        self.block3 = Block(2 * width, 4 * width, stride=2)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.block3(self.block2(self.block1(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class ImageClassifier(L.LightningModule):
    """Classifies images; logs `train/loss` and `val/error` (%).

    The learning rate follows a cosine to zero over the whole run and looks at no validation metric, so what
    is validated cannot change what is trained.

    Args:
        in_channels: Channels of an image (linked to the data on the command line).
        num_classes: Classes (linked to the data on the command line).
        network: `resnet8`, or the name of a torchvision classification model such as `resnet50`.
        width: Channels of the first block of `resnet8`; the second and third have twice and four times as
        many. lr: Learning rate at the start.
        momentum: SGD's momentum (not BatchNorm's).
        weight_decay: SGD's weight decay.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        network: str = "resnet8",
        width: int = 16,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if network == "resnet8":
            self.network: nn.Module = ResNet8(in_channels, num_classes, width)
        else:
            from torchvision.models import get_model

            self.network = get_model(network, num_classes=num_classes)
        # A third faster on a CPU.
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        wrong = (self(images).argmax(1) != labels).float()
        self.log("val/error", 100 * wrong.mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        sgd = torch.optim.SGD(self.parameters(), hp["lr"], momentum=hp["momentum"], weight_decay=hp["weight_decay"])
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
