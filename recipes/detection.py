"""What both recipes with detectors share: backbone, schedule, training on several ranks, evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from urllib.error import URLError

import lightning as L
import torch
from jsonargparse import ArgumentParser  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, hub, nn
from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights, ResNet50_Weights, mobilenet_v2
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from recipes.average_precision import AP, Detections, ap_by_part
from recipes.scenes import STAMPS, SceneData

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
Backbone: TypeAlias = Literal["mobilenet_v2", "resnet18", "resnet50"]
WEIGHTS = {
    "mobilenet_v2": MobileNet_V2_Weights.IMAGENET1K_V1,
    "resnet18": ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": ResNet50_Weights.IMAGENET1K_V1,
}
TRAINER = {"trainer.accelerator": "cpu", "trainer.max_epochs": 1}
UNIT = "APs are COCO's, in percent; equal means within one point. Parts of the validation images count as repetitions."
SMOKE = {
    "data.train_images": 16,
    "data.val_images": 6,
    "model.pretrained": False,
    "model.warmup_steps": 2,
    "parts": 2,
}
FULL = {
    "data.cut_outs": STAMPS,
    "data.train_images": 16_000,
    "data.val_images": 500,
    "data.size": 160,
    "model.image_size": 160,
    "model.max_image_size": 160,
    "seeds": [0, 1, 2],
}


def add_arguments(
    parser: ArgumentParser, detector: type["Detection"], *, skip_data: set[str], skip_model: set[str]
) -> None:
    """Adds the settings of data, model and Trainer, except those that the recipe sets."""
    parser.add_argument("--images_per_step", type=PositiveInt, default=4, help="images of a step, on all ranks")
    parser.add_argument("--parts", type=PositiveInt, default=5, help="parts of the validation images, for the spread")
    parser.add_class_arguments(SceneData, "data", skip=skip_data, instantiate=False)
    parser.add_class_arguments(detector, "model", skip=skip_model, instantiate=False)
    skip = {"logger", "devices", "strategy", "callbacks", "accumulate_grad_batches", "limit_val_batches"}
    parser.add_class_arguments(L.Trainer, "trainer", skip=skip, instantiate=False, fail_untyped=False)


class Detection(L.LightningModule):
    """Trains a detector, and keeps its detections of an evaluation.

    Args:
        model: A detector of torchvision.
        lr: Learning rate.
        warmup_steps: Steps over which the learning rate rises at the start.
        lr_falls: Fractions of all steps after which the learning rate is divided by ten.
        kinds: Kinds of AP: of boxes, of masks.
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
        self.detections: list[Detections] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses: dict[str, Tensor] = self.model(*batch)
        return torch.stack(list(losses.values())).sum()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.log("steps", float(self.trainer.global_step))  # the ranks' Trainer returns nothing but metrics

    def on_validation_epoch_start(self) -> None:
        self.detections = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        for predicted, target in zip(self.model(images), targets, strict=True):
            if "masks" in predicted:
                predicted["masks"] = (predicted["masks"][:, 0] > 0.5).to(torch.uint8)
            self.detections.append((_to_cpu(predicted), _to_cpu(target)))

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        sgd = torch.optim.SGD(trained, self.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            falls = sum(step >= fraction * steps for fraction in self.lr_falls)
            return float(min(1.0, (step + 1) / (self.warmup_steps + 1)) * 0.1**falls)

        schedule = torch.optim.lr_scheduler.LambdaLR(sgd, factor)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


Model = TypeVar("Model", bound=Detection, covariant=True)


@dataclass(frozen=True)
class Parts(Generic[Model]):
    """Model, data and Trainer arguments of one training."""

    model: Model
    data: SceneData
    trainer: dict[str, Any]


def train(made: Parts[Detection], callbacks: list[Callback], ranks: int, images_per_step: int) -> int:
    """Trains the model, in new processes if there are several ranks; returns the number of steps.

    An optimizer step takes `images_per_step` images on all ranks; gradients are accumulated if necessary.
    """
    # A fork needs no new imports, but cannot use CUDA.
    several = "ddp_fork" if made.trainer["accelerator"] == "cpu" else "ddp_spawn"
    saving = {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    trainer = L.Trainer(
        **{**made.trainer, "devices": ranks, "strategy": several if ranks > 1 else "auto", **saving},
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
    """Measures AP of boxes, and of masks if the model has them; in this process, image by image."""
    settings = {**made.trainer, "devices": 1, "enable_checkpointing": False}
    trainer = L.Trainer(**settings, logger=False, callbacks=callbacks)
    trainer.validate(made.model, made.data, ckpt_path=checkpoint, verbose=False)
    return {kind: ap_by_part(made.model.detections, kind, parts) for kind in made.model.kinds}


def check_images_per_step(training: str, *, ranks: int, images_per_gpu: int, images_per_step: int) -> None:
    """Raises an error unless an optimizer step consists of whole batches."""
    batch = ranks * images_per_gpu
    if images_per_step % batch:
        raise ValueError(
            f"images_per_step is {images_per_step}, but {training} has batches of {batch} images on {ranks} ranks: "
            f"use a multiple of {batch}."
        )


def number_of_images(batch: Any) -> int:
    return len(batch[0])


def fpn(
    backbone: Backbone,
    pretrained: bool,
    resnet_stages: Sequence[int] = (1, 2, 3, 4),
    extra_levels: ExtraFPNBlock | None = None,
) -> BackboneWithFPN:
    """Creates a backbone with FrozenBatchNorm and an FPN; its first stages are not trained.

    Of MobileNetV2, only strides 8 and 16 are used, because stride 32 makes 4x4 pixels of a scene of 128. It has 64
    channels, on which a CPU pools regions much faster than on 256.

    Args:
        backbone: Name of the backbone.
        pretrained: Use ImageNet weights, from torchvision's cache or the network.
        resnet_stages: Stages of a ResNet that the FPN uses: stage 1 has stride 4, each further one twice as much.
        extra_levels: Module that adds levels; by default one level, by pooling.

    Raises:
        FileNotFoundError: The weights are not in torch's cache, and cannot be downloaded.
    """
    weights = WEIGHTS[backbone] if pretrained else None
    if weights is not None:
        try:
            weights.get_state_dict()
        except URLError as error:
            raise FileNotFoundError(
                f"{weights.url} cannot be downloaded ({error.reason}). Put the file into {hub.get_dir()}/checkpoints, "
                "or train without ImageNet weights: --model.pretrained false."
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


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}
