"""Models of segmentation and detection: torchvision's, and narrow ones for small budgets. All start at random."""

from __future__ import annotations

from torch import nn

from benchmarks.accuracy.resnet import trunk


def small_fcn(classes: int, width: int = 16, blocks: int = 5) -> nn.Module:
    """A fully convolutional network on three stages of basic blocks, at 1/16 of the resolution.

    Args:
        classes: number of classes.
        width: channels of the first stage.
        blocks: how many blocks each stage has.

    """
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone = IntermediateLayerGetter(trunk(width, [blocks] * 3), {"layer3": "out"})
    model: nn.Module = FCN(backbone, FCNHead(4 * width, classes))
    return model


def fcn_resnet50(classes: int) -> nn.Module:
    """Fully convolutional, on a ResNet-50: torchvision's."""
    from torchvision.models.segmentation import fcn_resnet50

    model: nn.Module = fcn_resnet50(weights=None, weights_backbone=None, num_classes=classes)
    return model


def small_fcos(classes: int, width: int = 16, blocks: int = 6, side: int = 160) -> nn.Module:
    """FCOS on three stages of basic blocks, with a pyramid of the second, the third and one more at half of that.

    Args:
        classes: number of labels, 0 among them, which stands for nothing.
        width: channels of the first stage; twice that is what the pyramid has.
        blocks: how many blocks each stage has.
        side: what the shorter side of a picture is resized to.

    """
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    layers = {"layer2": "0", "layer3": "1"}
    backbone = BackboneWithFPN(trunk(width, [blocks] * 3), layers, [2 * width, 4 * width], 2 * width)
    # One anchor a place, as large as the stride of its level.
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    model: nn.Module = FCOS(
        backbone, classes, min_size=side, max_size=2 * side, anchor_generator=anchors, score_thresh=0.05
    )
    return model


def fcos_resnet50(classes: int) -> nn.Module:
    """FCOS on a ResNet-50 with a feature pyramid: torchvision's."""
    from torchvision.models.detection import fcos_resnet50_fpn

    model: nn.Module = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=classes)
    return model
