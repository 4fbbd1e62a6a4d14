"""Image classification in memory: pixels as bytes, batches made on tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.seeds import chosen, generator
from replfx import ReplfxError
from replfx.demo.data import augmented, cifar10_pixels

Batch = tuple[Tensor, Tensor]
EVALUATED = 500
"""Images a batch when the accuracy is taken."""


@dataclass(frozen=True)
class Images:
    """A classification set: images (N, C, H, W) uint8 and labels (N,) int64, for training and for the test."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    augment: bool = True
    """Whether training shifts images by up to an eighth of their width and mirrors half of them."""
    channels_last: ClassVar[bool] = True

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training pixels a channel, each (1, C, 1, 1)."""
        moments = [_moments(self.train[:, channel]) for channel in range(self.train.shape[1])]
        mean, deviation = torch.tensor(moments, device=self.train.device).T
        return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    @property
    def examples(self) -> int:
        """How many training images there are."""
        return len(self.train)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Shift and scale by the training images' mean and deviation a channel."""
        mean, deviation = self.statistics
        return (pixels.float() - mean) / deviation

    def to(self, device: torch.device) -> Images:
        """Move everything to a device."""
        return replace(
            self,
            train=self.train.to(device),
            train_labels=self.train_labels.to(device),
            test=self.test.to(device),
            test_labels=self.test_labels.to(device),
        )

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The batch of a step: a function of its arguments alone, so that a run can go on anywhere.

        Returns:
            normalised images (size, C, H, W) and labels (size,).

        Raises:
            ReplfxError: there are not enough images for one batch.

        """
        taken = torch.tensor(chosen(self.examples, seed, step, size), device=self.train.device)
        images = self.normalised(self.train[taken])
        if self.augment:
            images = augmented(images, generator(seed, "augmentation", step))
        return images.contiguous(memory_format=torch.channels_last), self.train_labels[taken]

    @staticmethod
    def inputs(batch: Batch) -> Tensor:
        """The images."""
        return batch[0]

    @staticmethod
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch."""
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels)

    @torch.no_grad()
    def metric(self, model: nn.Module, final: bool) -> float:
        """Accuracy on the test images, in percent; `model` is in evaluation mode."""
        batches = zip(self.test.split(EVALUATED), self.test_labels.split(EVALUATED), strict=True)
        hits = [(model(self._prepared(x)).argmax(1) == y).sum() for x, y in batches]
        return 100 * int(torch.stack(hits).sum()) / len(self.test)

    def _prepared(self, pixels: Tensor) -> Tensor:
        return self.normalised(pixels).contiguous(memory_format=torch.channels_last)


def _moments(pixels: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of bytes."""
    # By way of how often each occurs: a float copy of all pixels would be four times their size.
    counts = torch.bincount(pixels.flatten(), minlength=256).double().cpu()
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean).square()).sum() / counts.sum()
    return float(mean), max(float(variance.sqrt()), 1.0)


def cifar10(root: Path) -> Images:
    """CIFAR-10 from ``cifar10/{train,test}/CLASS/*.png`` or ``cifar-10-batches-py`` under `root`."""
    train, train_labels, test, test_labels = cifar10_pixels(root)
    return Images(train, train_labels, test, test_labels)


def fashion_mnist(root: Path) -> Images:
    """Fashion-MNIST from ``FashionMNIST/raw/*-ubyte`` under `root`."""
    from torchvision.datasets import FashionMNIST

    try:
        parts = [FashionMNIST(str(root), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ReplfxError(f"no Fashion-MNIST in {root}: FashionMNIST/raw lacks files") from error
    (train, train_labels), (test, test_labels) = ((part.data.unsqueeze(1), part.targets.long()) for part in parts)
    return Images(train, train_labels, test, test_labels)


def svhn(root: Path) -> Images:
    """SVHN from ``svhn/{train,test}_32x32.mat`` under `root`, without its extra images; digits are not mirrored."""
    from scipy.io import loadmat

    parts = []
    for split in ("train", "test"):
        path = root / "svhn" / f"{split}_32x32.mat"
        if not path.is_file():
            raise ReplfxError(f"no SVHN in {root}: there is no {path.relative_to(root)}")
        content = loadmat(path)
        # (H, W, C, N) and (N, 1); the digit 0 has the label 10.
        pixels = torch.from_numpy(content["X"].transpose(3, 2, 0, 1).copy())
        parts += [pixels, torch.from_numpy(content["y"].astype(np.int64).flatten() % 10)]
    train, train_labels, test, test_labels = parts
    return Images(train, train_labels, test, test_labels, augment=False)


def stl10(root: Path) -> Images:
    """STL-10 from ``stl10_binary/{train,test}_{X,y}.bin`` under `root`, without its unlabelled images."""
    parts = []
    for split in ("train", "test"):
        paths = [root / "stl10_binary" / f"{split}_{kind}.bin" for kind in "Xy"]
        if missing := [path for path in paths if not path.is_file()]:
            raise ReplfxError(f"no STL-10 in {root}: there is no {missing[0].relative_to(root)}")
        pixels, labels = (np.fromfile(path, dtype=np.uint8) for path in paths)
        if pixels.size != labels.size * 3 * 96 * 96:
            raise ReplfxError(f"{paths[0]} has {pixels.size} bytes, which are not {labels.size} images of 3 × 96 × 96")
        # Column by column; labels from 1 on.
        images = pixels.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2).copy()
        parts += [torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) - 1)]
    train, train_labels, test, test_labels = parts
    return Images(train, train_labels, test, test_labels)
