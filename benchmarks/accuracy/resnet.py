"""The residual networks for small images of He et al. (arXiv 1512.03385, section 4.2), of any depth and width."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

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


def skipped(block: nn.Module) -> nn.Module:
    """What stays of a residual block without its branch: nothing, or of one that changes the shape the shortcut.

    Args:
        block: a `BasicBlock`, a block of torchvision's ResNets, or one that gives what has its input's shape.

    """
    if isinstance(block, BasicBlock):
        # Its shortcut's input is never negative, so that the ReLU after the sum has nothing left to do.
        return block.shortcut
    downsample = getattr(block, "downsample", None)
    return nn.Sequential(downsample, nn.ReLU()) if isinstance(downsample, nn.Module) else nn.Identity()


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
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images: (N, channels, H, W) to (N, classes) logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def trunk(width: int, blocks: Sequence[int]) -> nn.Sequential:
    """A residual network without its classifier, for dense predictions on larger images, as narrow as wanted.

    A stem goes to a quarter of the resolution, as that of He et al.'s ImageNet networks does, and each stage after
    the first halves it again and doubles the channels.

    Args:
        width: channels of the first stage.
        blocks: how many basic blocks each stage has.

    Returns:
        the stem and layer1, layer2, …, one after the other.

    """
    stem = nn.Sequential(
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    parts = OrderedDict[str, nn.Module](stem=stem)
    channels_in = width
    for number, count in enumerate(blocks):
        channels = width << number
        parts[f"layer{number + 1}"] = _stage(channels_in, channels, count, stride=2 if number else 1)
        channels_in = channels
    network = nn.Sequential(parts)
    _initialise(network)
    return network


def classifier(width: int, blocks: Sequence[int], classes: int) -> nn.Module:
    """Classify images by what the last stage of a `trunk` makes of them, on average over the places."""
    features = width << (len(blocks) - 1)
    parts = OrderedDict[str, nn.Module](
        trunk=trunk(width, blocks), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(features, classes)
    )
    return nn.Sequential(parts)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
