"""What recipes with detectors do alike: backbone, schedule, training on ranks, and what is found in evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from urllib.error import URLError

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, hub, nn
from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights, ResNet50_Weights, mobilenet_v2
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from recipes import command
from recipes.average_precision import AP, Found, in_parts
from recipes.scenes import SceneData

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
Backbone: TypeAlias = Literal["mobilenet_v2", "resnet18", "resnet50"]
WEIGHTS = {
    "mobilenet_v2": MobileNet_V2_Weights.IMAGENET1K_V1,
    "resnet18": ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": ResNet50_Weights.IMAGENET1K_V1,
}
TRAINER = {
    **{
        name: value
        for name, value in command.TRAINER.items()
        if name not in ("trainer.devices", "trainer.deterministic")
    },
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 1,
}
"""Settings of every preset's Trainer."""


class Detection(L.LightningModule):
    """Trains a detector and keeps what it finds in evaluation, for AP.

    Args:
        model: One of torchvision's.
        lr: Learning rate.
        warmup_steps: Steps over which it rises at the start.
        lr_falls: Shares of all steps after each of which it is a tenth of what it was.
        kinds: What AP is taken of.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        warmup_steps: int,
        lr_falls: tuple[float, float],
        kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox",),
    ) -> None:
        super().__init__()
        self.model, self.kinds = model, kinds
        self.lr, self.warmup_steps, self.lr_falls = lr, warmup_steps, lr_falls
        self.found: list[Found] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses: dict[str, Tensor] = self.model(*batch)
        return torch.stack(list(losses.values())).sum()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.log("steps", float(self.trainer.global_step))  # of the ranks' Trainer, only metrics come back

    def on_validation_epoch_start(self) -> None:
        self.found = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        for one, target in zip(self.model(images), targets, strict=True):
            if "masks" in one:
                one["masks"] = (one["masks"][:, 0] > 0.5).to(torch.uint8)
            self.found.append((_on_cpu(one), _on_cpu(target)))

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        sgd = torch.optim.SGD(trained, self.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            fallen = sum(step >= share * steps for share in self.lr_falls)
            return float(min(1.0, (step + 1) / (self.warmup_steps + 1)) * 0.1**fallen)

        schedule = torch.optim.lr_scheduler.LambdaLR(sgd, factor)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


Model = TypeVar("Model", bound=Detection, covariant=True)


@dataclass(frozen=True)
class Parts(Generic[Model]):
    """What one training run is made of; made anew for every one."""

    model: Model
    data: SceneData
    trainer: dict[str, Any]  # arguments of the Trainer


def train(made: Parts[Detection], callbacks: list[Callback], ranks: int, images_per_step: int) -> int:
    """Trains the model, in processes of its own if there are several; returns the number of steps.

    An optimizer step takes `images_per_step` images on all ranks, accumulated if need be.
    """
    # A fork has everything imported already, but cannot use CUDA.
    several = "ddp_fork" if made.trainer["accelerator"] == "cpu" else "ddp_spawn"
    trainer = L.Trainer(
        **{**made.trainer, "devices": ranks, "strategy": several if ranks > 1 else "auto"},
        accumulate_grad_batches=images_per_step // (ranks * made.data.images_per_gpu),
        limit_val_batches=0,
        logger=False,
        callbacks=callbacks,
    )
    trainer.fit(made.model, made.data)
    return int(trainer.callback_metrics["steps"])


def evaluate(
    made: Parts[Detection], callbacks: list[Callback], parts: int, checkpoint: Path | None = None
) -> dict[Literal["bbox", "segm"], AP]:
    """Of boxes, and of masks if there are any; in this process, image by image."""
    settings = {**made.trainer, "devices": 1, "enable_checkpointing": False}
    trainer = L.Trainer(**settings, logger=False, callbacks=callbacks)
    trainer.validate(made.model, made.data, ckpt_path=checkpoint, verbose=False)
    return {kind: in_parts(made.model.found, kind, parts) for kind in made.model.kinds}


def check_ragged_steps(training: str, ranks: int, images_per_gpu: int, images_per_step: int) -> None:
    """An optimizer step is made of whole batches.

    Raises:
        ValueError: If it is not.
    """
    batch = ranks * images_per_gpu
    if images_per_step % batch:
        raise ValueError(
            f"images_per_step is {images_per_step}, but {training} has {batch} images on its {ranks} ranks: "
            f"give a multiple of {batch}."
        )


def number_of_images(batch: Any) -> int:
    return len(batch[0])


def fpn(
    backbone: Backbone,
    pretrained: bool,
    resnet_stages: Sequence[int] = (1, 2, 3, 4),
    extra_levels: ExtraFPNBlock | None = None,
) -> BackboneWithFPN:
    """With FrozenBatchNorm, its first stages fixed.

    MobileNetV2 gives its strides 8 and 16 only, since a further one would see a scene of 128 pixels as 4x4, and 64
    channels, on which a CPU pools regions in a fraction of the time.

    Args:
        backbone: Its name.
        pretrained: ImageNet's weights, from torchvision's cache or the net.
        resnet_stages: Those of a ResNet that the pyramid is built on: the first has stride 4, each next one twice as
            much.
        extra_levels: What makes levels beyond; by default one, by pooling.

    Raises:
        FileNotFoundError: If the weights are not in torch's cache, and cannot be fetched.
    """
    weights = WEIGHTS[backbone] if pretrained else None
    if weights is not None:
        try:
            weights.get_state_dict()
        except URLError as error:
            raise FileNotFoundError(
                f"{weights.url} cannot be fetched ({error.reason}). Put that file into {hub.get_dir()}/checkpoints, or "
                "train without ImageNet's weights: --model.pretrained false."
            ) from error
    if backbone != "mobilenet_v2":
        return resnet_fpn_backbone(
            backbone_name=backbone,
            weights=weights,
            trainable_layers=3,
            returned_layers=list(resnet_stages),
            extra_blocks=extra_levels,
        )
    stages = mobilenet_v2(weights=weights, norm_layer=FrozenBatchNorm2d).features[:14]
    stages[:4].requires_grad_(False)
    return BackboneWithFPN(stages, {"6": "0", "13": "1"}, [32, 96], out_channels=64, extra_blocks=extra_levels)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}
