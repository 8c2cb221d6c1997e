"""The detector: torchvision's Faster or Mask R-CNN, its own head classes with BN, GN or nothing in them.

The backbone is frozen or fine-tuned with FrozenBatchNorm, so the head is the only place where norms differ.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights, ResNet50_Weights, mobilenet_v2
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

Norm = Literal["BN", "GN", "none"]
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
WEIGHTS = {
    "mobilenet_v2": MobileNet_V2_Weights.IMAGENET1K_V1,
    "resnet18": ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": ResNet50_Weights.IMAGENET1K_V1,
}
HEADS = "model.roi_heads.*_head"  # modules of this LightningModule: the box head, and the mask head if there is one


class Detector(L.LightningModule):
    """Trains a detector and keeps what it finds in evaluation, for AP.

    Args:
        num_classes: Classes, the background included (linked to the data on the command line).
        head_norm: What the convolutions of the heads are followed by (set by the experiment).
        backbone: `mobilenet_v2`, `resnet18` or `resnet50`, with an FPN and FrozenBatchNorm.
        pretrained: ImageNet's weights, from torchvision's cache or the net.
        masks: A mask head, too: Mask R-CNN.
        head_width: Channels of the heads' four convolutions.
        regions: Regions of an image that the heads are trained on.
        regions_in_evaluation: Regions of an image that the box head is given in evaluation.
        image_size: To which the shorter side of an image is brought.
        max_image_size: What the longer side is kept below.
        smallest_anchor: Side of the smallest anchor in pixels; that of the next level is twice as long.
        lr: Learning rate. It falls to a tenth after two thirds and eight ninths of the steps, as in the paper.
        warmup_steps: Steps over which it rises at the start.
    """

    def __init__(
        self,
        num_classes: int = 11,
        head_norm: Norm = "BN",
        backbone: Literal["mobilenet_v2", "resnet18", "resnet50"] = "mobilenet_v2",
        pretrained: bool = True,
        masks: bool = False,
        head_width: int = 32,
        regions: int = 32,
        regions_in_evaluation: int = 100,
        image_size: int = 128,
        max_image_size: int = 128,
        smallest_anchor: int = 16,
        lr: float = 0.02,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        body = fpn(backbone, WEIGHTS[backbone] if pretrained else None)
        levels = len(body.fpn.inner_blocks)
        anchors = tuple((smallest_anchor * 2**level,) for level in range(levels + 1))  # and one of the pooled level
        norm = norm_layer(head_norm)
        box_head = FastRCNNConvFCHead((body.out_channels, 7, 7), [head_width] * 4, [4 * head_width], norm_layer=norm)
        options: dict[str, Any] = {
            "rpn_anchor_generator": AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * (levels + 1)),
            "box_roi_pool": MultiScaleRoIAlign([str(level) for level in range(levels)], 7, 2),
            "box_head": box_head,
            "box_predictor": FastRCNNPredictor(4 * head_width, num_classes),
            "box_batch_size_per_image": regions,
            "rpn_post_nms_top_n_train": 4 * regions,
            "rpn_post_nms_top_n_test": regions_in_evaluation,
            "min_size": image_size,
            "max_size": max_image_size,
        }
        if masks:
            options["mask_roi_pool"] = MultiScaleRoIAlign([str(level) for level in range(levels)], 14, 2)
            options["mask_head"] = MaskRCNNHeads(body.out_channels, [head_width] * 4, 1, norm_layer=norm)
            options["mask_predictor"] = MaskRCNNPredictor(head_width, head_width, num_classes)
        self.model = (MaskRCNN if masks else FasterRCNN)(body, **options)
        self.kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if masks else ("bbox",)
        self.found: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

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
        sgd = torch.optim.SGD(trained, self.hparams["lr"], momentum=0.9, weight_decay=1e-4)
        steps, warmup = int(self.trainer.estimated_stepping_batches), self.hparams["warmup_steps"]

        def factor(step: int) -> float:
            return float(
                min(1.0, (step + 1) / (warmup + 1)) * 0.1 ** ((step >= steps * 2 / 3) + (step >= steps * 8 / 9))
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(sgd, factor)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fpn(backbone: Literal["mobilenet_v2", "resnet18", "resnet50"], weights: WeightsEnum | None) -> BackboneWithFPN:
    """With FrozenBatchNorm, its first stages fixed.

    MobileNetV2 gives its strides 8 and 16 only, since a further one would see a scene of 128 pixels as 4x4, and 64
    channels, on which a CPU pools regions in a fraction of the time.
    """
    if backbone != "mobilenet_v2":
        return resnet_fpn_backbone(backbone_name=backbone, weights=weights, trainable_layers=3)
    stages = mobilenet_v2(weights=weights, norm_layer=FrozenBatchNorm2d).features[:14]
    stages[:4].requires_grad_(False)
    return BackboneWithFPN(stages, {"6": "0", "13": "1"}, [32, 96], out_channels=64)


def average_precision(
    found: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]], kind: Literal["bbox", "segm"]
) -> float:
    """COCO's AP of these images, in percent."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_type=kind, backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    metric.update([one for one, _ in found], [target for _, target in found])
    return 100 * float(metric.compute()["map"])


def norm_layer(norm: Norm) -> Callable[..., nn.Module] | None:
    """GroupNorm has eight channels a group: 32 groups of 256 channels, as usual."""
    if norm == "GN":
        return lambda channels: nn.GroupNorm(channels // 8, channels)
    return nn.BatchNorm2d if norm == "BN" else None


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}
