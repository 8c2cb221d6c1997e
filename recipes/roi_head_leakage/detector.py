"""The detector: torchvision's Faster or Mask R-CNN, with BN, GN or no norm in its heads.

The backbone has FrozenBatchNorm, so norms differ in the heads only.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from recipes.detection import Backbone, Detection, fpn

Norm = Literal["BN", "GN", "none"]
HEADS = "model.roi_heads.*_head"  # the box head, and the mask head if there is one


class Detector(Detection):
    """Faster or Mask R-CNN with a choice of norm in its heads.

    Args:
        num_classes: Classes, the background included (linked to the data on the command line).
        head_norm: Norm after the convolutions of the heads (set by the recipe).
        backbone: `mobilenet_v2`, `resnet18` or `resnet50`, with an FPN and FrozenBatchNorm.
        pretrained: Use ImageNet weights, from torchvision's cache or the network.
        masks: Add a mask head: Mask R-CNN.
        head_width: Channels of the four convolutions of each head.
        regions: Regions per image in training.
        regions_in_evaluation: Regions per image in evaluation.
        image_size: Shorter side of resized images.
        max_image_size: Largest longer side of resized images.
        smallest_anchor: Side of the smallest anchor in pixels; it doubles with each level.
        lr: Learning rate.
        warmup_steps: Steps over which the learning rate rises at the start.
        lr_falls: Fractions of all steps after which the learning rate is divided by ten.
    """

    def __init__(
        self,
        num_classes: int = 11,
        head_norm: Norm = "BN",
        backbone: Backbone = "mobilenet_v2",
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
        lr_falls: tuple[float, float] = (2 / 3, 8 / 9),
    ) -> None:
        body = fpn(backbone, pretrained)
        levels = len(body.fpn.inner_blocks)
        anchors = tuple((smallest_anchor * 2**level,) for level in range(levels + 1))  # and one for the pooled level
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
        model = (MaskRCNN if masks else FasterRCNN)(body, **options)
        super().__init__(model, lr, warmup_steps, lr_falls, kinds=("bbox", "segm") if masks else ("bbox",))
        self.save_hyperparameters()


def norm_layer(norm: Norm) -> Callable[..., nn.Module] | None:
    """GroupNorm has eight channels per group, which are the usual 32 groups of 256 channels."""
    if norm == "GN":
        return lambda channels: nn.GroupNorm(channels // 8, channels)
    return nn.BatchNorm2d if norm == "BN" else None
