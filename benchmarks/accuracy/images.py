"""Image classification in memory: pixels as bytes, batches made on tensors."""

from __future__ import annotations

import pickle
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

    def part(self, count: int) -> Images:
        """The same set with so many training images, drawn once and for all."""
        taken = torch.randperm(self.examples, generator=torch.Generator().manual_seed(0))[:count]
        return replace(self, train=self.train[taken], train_labels=self.train_labels[taken])

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
    """CIFAR-10 from ``cifar10/{train,test}/CLASS/*.png`` or, as it comes, ``cifar-10-batches-py`` under `root`.

    Raises:
        ReplfxError: `root` has neither.
    """
    folders, batches = root / "cifar10", root / "cifar-10-batches-py"
    if (folders / "train").is_dir() and (folders / "test").is_dir():
        train, test = _image_folder(folders / "train"), _image_folder(folders / "test")
    elif batches.is_dir():
        train = _pickled([batches / f"data_batch_{i}" for i in range(1, 6)])
        test = _pickled([batches / "test_batch"])
    else:
        raise ReplfxError(f"no CIFAR-10 in {root}: it has neither cifar10/train and cifar10/test nor {batches.name}")
    return Images(*train, *test)


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


def _image_folder(folder: Path) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(folder))
    pixels = np.stack([np.asarray(image.convert("RGB")) for image, _ in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets)


def _pickled(files: list[Path]) -> tuple[Tensor, Tensor]:
    # The published files are pickles; they are the user's own download, as torchvision reads them too.
    parts = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
    pixels = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([part[b"labels"] for part in parts])
    return torch.from_numpy(pixels), torch.from_numpy(labels).long()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its width, and mirror half of them left to right."""
    count, _, size, _ = images.shape
    reach = size // 8
    padded = torch.nn.functional.pad(images, [reach] * 4)
    offsets = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    rows, columns = offsets + torch.arange(size)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count, device=images.device)[:, None, None]
    rows, columns = rows.to(images.device), columns.to(images.device)
    # Indices around a slice: the channels come out last.
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
