"""Classification of photographs that are read from disk: ImageNet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.files import CPU, OnDisk, Source, made, normalised, opened, pixels
from benchmarks.accuracy.seeds import chosen, generator
from replfx import ReplfxError

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = tuple[Tensor, Tensor]
Box = tuple[int, int, int, int]
EVALUATED = 100
"""Photographs a batch when the accuracy is taken."""
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
"""What part of a photograph, and of what width to height, a training step sees."""
SHOWN = 224 / 256
"""How much of the shorter side the test sees."""


@dataclass(frozen=True)
class Photos:
    """A classification set on disk, each example a photograph and its label.

    Attributes:
        train, test: the examples.
        size: height and width of what a model sees: in training a random part, in the test the middle.
        device: where batches are.
    """

    train: Source[tuple[Image, int]]
    test: Source[tuple[Image, int]]
    size: int = 224
    device: torch.device = CPU
    channels_last: ClassVar[bool] = True

    def to(self, device: torch.device) -> Photos:
        """Have batches on a device."""
        return replace(self, device=device)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The batch of a step, a function of its arguments alone.

        Returns:
            normalised images (size, 3, H, W) and labels (size,) int64.

        Raises:
            ReplfxError: there are not enough images for one batch.

        """

        def seen(place: int, example: tuple[Image, int]) -> tuple[Tensor, int]:
            image, label = example
            drawn = generator(seed, f"augmentation {step}", place)
            part = pixels(self._resized(image, random_box(image.width, image.height, drawn)))
            return (part.flip(2) if bool(torch.rand((), generator=drawn) < 0.5) else part), label

        return self._batched(made(self.train, chosen(len(self.train), seed, step, size), seen))

    def _resized(self, image: Image, box: Box) -> Image:
        from PIL.Image import Resampling

        return image.convert("RGB").resize((self.size, self.size), Resampling.BILINEAR, box=box)

    def _batched(self, examples: Iterable[tuple[Tensor, int]]) -> Batch:
        images, labels = zip(*examples, strict=True)
        stacked = normalised(torch.stack(images).to(self.device))
        return stacked.contiguous(memory_format=torch.channels_last), torch.tensor(labels, device=self.device)

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

        def seen(place: int, example: tuple[Image, int]) -> tuple[Tensor, int]:
            image, label = example
            return pixels(self._resized(image, middle_box(image.width, image.height))), label

        hits = 0
        for start in range(0, len(self.test), EVALUATED):
            wanted = range(start, min(start + EVALUATED, len(self.test)))
            images, labels = self._batched(made(self.test, wanted, seen))
            hits += int((model(images).argmax(1) == labels).sum())
        return 100 * hits / len(self.test)


def random_box(width: int, height: int, drawn: torch.Generator) -> Box:
    """A part of a picture of random place, area (`AREA`) and shape (`RATIO`), as Inception's training takes it.

    Returns:
        left, top, right and bottom.

    """
    for _ in range(10):
        share, shape, across, down = torch.rand(4, generator=drawn).tolist()
        area = width * height * (AREA[0] + share * (AREA[1] - AREA[0]))
        ratio = math.exp(math.log(RATIO[0]) + shape * (math.log(RATIO[1]) - math.log(RATIO[0])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    # A picture too long for that: its middle, as much of it as the shapes allow.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def middle_box(width: int, height: int) -> Box:
    """The square in the middle, of `SHOWN` of the shorter side."""
    side = max(1, round(SHOWN * min(width, height)))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def imagenet(root: Path) -> Photos:
    """ImageNet from ``imagenet/{train,val}/CLASS/*``, as torchvision leaves it; the metric is taken on ``val``."""
    from torchvision.datasets import ImageFolder

    try:
        train, test = (ImageFolder(str(root / "imagenet" / split)) for split in ("train", "val"))
    except FileNotFoundError as error:
        raise ReplfxError(f"no ImageNet in {root}: imagenet/train and imagenet/val have a folder a class") from error
    if train.classes != test.classes:
        raise ReplfxError(f"{root / 'imagenet'}: train and val have to have the same class folders")
    return Photos(OnDisk(train.samples, _labelled), OnDisk(test.samples, _labelled))


def _labelled(sample: tuple[str, int]) -> tuple[Image, int]:
    path, label = sample
    return opened(Path(path)), label
