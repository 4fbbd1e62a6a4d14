"""Image classification in memory: pixels as bytes, batches made on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.seeds import generator
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

        Each pass over the images has its own order; what does not fill a batch at its end is left out.

        Returns:
            normalised images (size, C, H, W) and labels (size,).

        Raises:
            ReplfxError: there are not enough images for one batch.

        """
        if size > self.examples:
            raise ReplfxError(f"{self.examples} training images do not fill one batch of {size}")
        passes, place = divmod(step, self.examples // size)
        chosen = _order(self.examples, seed, passes)[place * size : (place + 1) * size].to(self.train.device)
        images = self.normalised(self.train[chosen])
        if self.augment:
            images = augmented(images, generator(seed, "augmentation", step))
        return images.contiguous(memory_format=torch.channels_last), self.train_labels[chosen]

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


@lru_cache(maxsize=2)
def _order(count: int, seed: int, passes: int) -> Tensor:
    """The order of the images in one pass over them; kept, because each step of the pass asks for it."""
    return torch.randperm(count, generator=generator(seed, "order", passes))


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


LOADERS: dict[str, Callable[[Path], Images]] = {"cifar10": cifar10, "fashion-mnist": fashion_mnist}
