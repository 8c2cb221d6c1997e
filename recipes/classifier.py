"""The image classifier of the recipes: a ResNet-8 or deeper, SGD with momentum, cosine learning rate."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, Namespace  # type: ignore[attr-defined, unused-ignore]
from torch import Tensor, nn

from lightning_bn.core.checks import check_int

NETWORKS = {"resnet8": (1, True), "resnet20": (3, True), "plain20": (3, False)}  # blocks per stage, with shortcuts
TRAINER = {"trainer.devices": 1, "trainer.deterministic": True}


def add_arguments(parser: ArgumentParser, data: type[L.LightningDataModule]) -> None:
    """Adds the settings of data, model and Trainer."""
    parser.add_class_arguments(data, "data")
    parser.add_class_arguments(ImageClassifier, "model")
    parser.add_class_arguments(L.Trainer, "trainer", skip={"logger"}, instantiate=False, fail_untyped=False)
    parser.link_arguments("data.num_channels", "model.in_channels", apply_on="instantiate")
    parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")


def training(config: Namespace, batch_size: int) -> str:
    """Describes a training in words."""
    model, epochs = config.model, config.trainer.max_epochs
    sgd = f"SGD, batch {batch_size:,}, learning rate {model.lr:g} on a cosine schedule, {epochs} epochs"
    return f"{model.network} of width {model.width}, {sgd}"


class Block(nn.Module):
    """Two 3x3 convolutions with BN and an optional shortcut, which has a 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module | None = nn.Identity() if shortcut else None
        if shortcut and (stride > 1 or in_channels != channels):
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y if self.shortcut is None else y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem with stride 2 and three stages of blocks, for images of about 30 pixels.

    Args:
        in_channels: Channels of an image.
        num_classes: Classes.
        width: Channels of the first stage; the second has twice, the third four times as many.
        blocks: Blocks per stage: 1 for a ResNet-8, 3 for a ResNet-20.
        shortcuts: False for a plain network.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, blocks: int, shortcuts: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.num_blocks = 3 * blocks
        inputs = width
        for index in range(self.num_blocks):
            channels = width * 2 ** (index // blocks)
            stride = 2 if channels > inputs else 1
            self.add_module(f"block{index + 1}", Block(inputs, channels, stride, shortcuts))
            inputs = channels
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        for index in range(self.num_blocks):
            x = self.get_submodule(f"block{index + 1}")(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class ImageClassifier(L.LightningModule):
    """Classifies images; logs `train/loss` and `val/error` (%).

    The learning rate depends on the step alone, so validation cannot change the training.

    Args:
        in_channels: Channels of an image (linked to the data on the command line).
        num_classes: Classes (linked to the data on the command line).
        network: `resnet8` (9 BN layers), `resnet20` (21), `plain20` (without shortcuts, 19), or a torchvision
            classification model such as `resnet50`.
        width: Channels of the first stage of the first three, at least 8.
        lr: Learning rate at the start; it falls to 0 on a cosine schedule.
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
        if network in NETWORKS:
            # In channels_last, 1x1 convolutions with stride 2 and fewer than 8 channels write past their memory
            # (torch 2.15, one thread, CPU without AVX-512). The process crashes or hangs some time later.
            check_int("model.width", width, at_least=8)
            self.network: nn.Module = ResNet(in_channels, num_classes, width, *NETWORKS[network])
        else:
            from torchvision.models import get_model

            self.network = get_model(network, num_classes=num_classes)
        self.network.to(memory_format=torch.channels_last)  # a third faster on a CPU

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
