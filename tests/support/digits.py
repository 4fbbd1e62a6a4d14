"""Handwritten digits, which come with scikit-learn, and small networks that learn them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import vision_transformer


@dataclass(frozen=True)
class Digits:
    """Normalised images (N, 1, 8, 8) and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images[:, None].astype(np.float32))
    split = train_test_split(images, bunch.target, test_size=0.3, random_state=0, stratify=bunch.target)
    train, test, labels, test_labels = split
    mean, deviation = train.mean(), train.std()
    as_tensor = torch.from_numpy
    return Digits((train - mean) / deviation, as_tensor(labels), (test - mean) / deviation, as_tensor(test_labels))


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
        return self.head(features)


def cnn() -> nn.Module:
    return ResidualCNN(1, 10, (16, 32), blocks=6)


def vit() -> nn.Module:
    """Sixteen patches an image."""
    return vision_transformer(8, 2, 1, 10, width=64, depth=8)


def train(model: nn.Module, data: Digits, epochs: int, seed: int) -> float:
    """Train with AdamW and one cycle; the seed fixes the order of the images.

    Returns:
        the share of the test images that it then gets right.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    batches = len(data.train_images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_images), generator=generator)
        for chosen in order[: batches * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return accuracy(model, data.test_images, data.test_labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model classifies as labelled."""
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum().item()) for x, y in batches)
    return right / len(labels)
