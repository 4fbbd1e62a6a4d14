"""The residual networks for small images of He et al. (arXiv 1512.03385, section 4.2), of any depth and width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PaddedShortcut(nn.Module):
    """The shortcut without parameters ("option A"): every `stride`-th pixel, new channels filled with zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        extra = channels - channels_in
        self.padding = (0, 0, 0, 0, extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, channels, ⌈H / stride⌉, ⌈W / stride⌉)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation beside a shortcut, and a ReLU after the sum."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        turns = stride != 1 or channels_in != channels
        self.shortcut = PaddedShortcut(channels_in, channels, stride) if turns else nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        """What the block adds to its shortcut."""
        y: Tensor = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        return torch.relu(self.branch(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of basic blocks; each after the first halves the resolution and doubles the channels.

    Args:
        depth: layers with weights, 6n + 2 for n blocks a stage (20, 32, 110).
        width: channels of the first stage; 16 is He et al.'s.
        channels: channels of an image.
        classes: number of labels.
        stride: of the first convolution; 2 works on a quarter of the pixels, for small budgets.

    Raises:
        ValueError: the depth is not 6n + 2.

    """

    def __init__(self, depth: int, width: int = 16, *, channels: int = 3, classes: int = 10, stride: int = 1) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"a depth of {depth} is not 6n + 2")
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Classify images: (N, channels, H, W) to (N, classes) logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
