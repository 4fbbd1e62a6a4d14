"""The demo's two models, at the size of its images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from replfx.demo.data import Images


class BasicBlock(nn.Module):
    """The residual block of CIFAR ResNets: two 3×3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualCNN(nn.Module):
    """A CIFAR-style ResNet: stages of basic blocks, each stage after the first at half the resolution."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        width_in = widths[0]
        for index, width in enumerate(widths):
            first = BasicBlock(width_in, width, stride=1 if index == 0 else 2)
            rest = [BasicBlock(width, width, stride=1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            width_in = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch of images."""
        features: Tensor = self.stages(self.stem(x)).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


def vit(data: Images) -> nn.Module:
    """Build a small vision transformer; sixteen patches an image, or sixty-four."""
    return vision_transformer(data.size, max(2, data.size // 8), data.channels, data.classes, width=64, depth=8)


def vision_transformer(size: int, patch: int, channels: int, classes: int, *, width: int, depth: int) -> nn.Module:
    """Build timm's VisionTransformer, narrow for its depth: heads of 16 to 32 channels, an MLP of twice the width.

    Args:
        size: height and width of an image.
        patch: height and width of a patch.
        channels: channels of an image.
        classes: number of labels.
        width: length of an activation.
        depth: number of blocks.

    """
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=channels,
        num_classes=classes,
        embed_dim=width,
        depth=depth,
        num_heads=max(4, width // 32),
        mlp_ratio=2.0,
        class_token=False,
        global_pool="avg",
        weight_init="reset",
    )
    # timm draws positions at 0.02, from which so narrow a model learns to tell them apart too slowly.
    nn.init.normal_(model.get_parameter("pos_embed"), std=0.5)
    return model


def cnn(data: Images) -> nn.Module:
    """Build the residual CNN; large images get one more stage."""
    widths = (16, 32) if data.size < 16 else (16, 32, 64)
    return ResidualCNN(data.channels, data.classes, widths, blocks=6)


MODELS: dict[str, Callable[[Images], nn.Module]] = {"ViT": vit, "CNN": cnn}
