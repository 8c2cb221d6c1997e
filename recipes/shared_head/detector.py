"""The detector: torchvision's RetinaNet or FCOS with BatchNorm in its head, which runs on every level of an FPN.

The backbone has FrozenBatchNorm, so only the head's BatchNorm layers are shared by levels.
"""

from typing import Literal

from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from recipes.detection import Backbone, Detection, fpn

HEADS = "model.head.*_head"  # modules that run their layers once for each level
CHANNELS: dict[Backbone, int] = {"mobilenet_v2": 64, "resnet18": 256, "resnet50": 256}


class Detector(Detection):
    """A one-stage detector with BatchNorm in its head.

    Args:
        num_classes: Classes, the background included (linked to the data on the command line).
        detector: `retinanet` or `fcos`.
        backbone: `mobilenet_v2`, `resnet18` or `resnet50`, with FrozenBatchNorm and an FPN of four or five levels from
            stride 8 on; convolutions make the last two.
        pretrained: Use ImageNet weights, from torchvision's cache or the network.
        image_size: Shorter side of resized images.
        max_image_size: Largest longer side of resized images.
        smallest_object: Side in pixels of the smallest objects of the finest level; it doubles with each level.
        lr: Learning rate.
        warmup_steps: Steps over which the learning rate rises at the start.
        lr_falls: Fractions of all steps after which the learning rate is divided by ten.
    """

    def __init__(
        self,
        num_classes: int = 11,
        detector: Literal["retinanet", "fcos"] = "retinanet",
        backbone: Backbone = "mobilenet_v2",
        pretrained: bool = True,
        image_size: int = 128,
        max_image_size: int = 128,
        smallest_object: int = 12,
        lr: float = 0.02,
        warmup_steps: int = 100,
        lr_falls: tuple[float, float] = (2 / 3, 8 / 9),
    ) -> None:
        channels = CHANNELS[backbone]
        body = fpn(backbone, pretrained, resnet_stages=(2, 3, 4), extra_levels=LastLevelP6P7(channels, channels))
        levels = len(body.fpn.inner_blocks) + 2
        sizes = [smallest_object * 2**level for level in range(levels)]
        resized = {"min_size": image_size, "max_size": max_image_size}
        model: nn.Module
        if detector == "retinanet":
            octave = [tuple(int(size * 2 ** (third / 3)) for third in range(3)) for size in sizes]
            anchors = AnchorGenerator(tuple(octave), ((0.5, 1.0, 2.0),) * levels)
            head = RetinaNetHead(channels, 9, num_classes, norm_layer=nn.BatchNorm2d)
            model = RetinaNet(body, num_classes, anchor_generator=anchors, head=head, **resized)
        else:
            # An FCOS level is for objects of four to eight times its anchor's size.
            anchors = AnchorGenerator(tuple((size // 4,) for size in sizes), ((1.0,),) * levels)
            head = FCOSHead(channels, 1, num_classes)
            head.classification_head = FCOSClassificationHead(channels, 1, num_classes, norm_layer=nn.BatchNorm2d)
            head.regression_head = FCOSRegressionHead(channels, 1, norm_layer=nn.BatchNorm2d)
            model = FCOS(body, num_classes, anchor_generator=anchors, head=head, **resized)
        super().__init__(model, lr, warmup_steps, lr_falls)
        self.levels = levels
