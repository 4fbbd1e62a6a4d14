"""Semantic segmentation: pictures with a class a pixel. CamVid, and CityScapes read from disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.files import CPU, OnDisk, Source, made, normalised, opened, pixels
from benchmarks.accuracy.seeds import chosen, generator
from replfx import ReplfxError

Batch = tuple[Tensor, Tensor]
Scene = tuple[Tensor, Tensor]
"""A picture (3, H, W) uint8 and the classes of its pixels (H, W) uint8."""
IGNORED = 255
"""The class of pixels that neither the loss nor the metric counts."""


@dataclass(frozen=True)
class Scenes:
    """A segmentation set; models of it give {"out": logits (N, classes, H, W)}, as torchvision's do.

    Attributes:
        train, test: the scenes.
        classes: how many classes there are beside `IGNORED`.
        crop: height and width of what a training step sees of a picture, as often mirrored as not.
        scales: by how much the picture is made smaller or larger before, at the least and at the most.
        device: where batches are.
    """

    train: Source[Scene]
    test: Source[Scene]
    classes: int
    crop: tuple[int, int]
    scales: tuple[float, float]
    device: torch.device = CPU
    channels_last: ClassVar[bool] = True

    def to(self, device: torch.device) -> Scenes:
        """Have batches on a device."""
        return replace(self, device=device)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The batch of a step, a function of its arguments alone.

        Returns:
            normalised images (size, 3, *crop) and classes (size, *crop) int64.

        Raises:
            ReplfxError: there are not enough scenes for one batch.

        """

        def seen(place: int, scene: Scene) -> Scene:
            return random_part(scene, self.crop, self.scales, generator(seed, f"augmentation {step}", place))

        images, classes = zip(*made(self.train, chosen(len(self.train), seed, step, size), seen), strict=True)
        return self._prepared(torch.stack(images)), torch.stack(classes).to(self.device).long()

    def _prepared(self, images: Tensor) -> Tensor:
        return normalised(images.to(self.device)).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def inputs(batch: Batch) -> Tensor:
        """The images."""
        return batch[0]

    @staticmethod
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch's pixels."""
        inputs, classes = batch
        return F.cross_entropy(model(inputs)["out"], classes, ignore_index=IGNORED)

    @torch.no_grad()
    def metric(self, model: nn.Module, final: bool) -> float:
        """Mean intersection over union of the classes on the test scenes, in percent.

        Both are counted over all scenes together. `model` is in evaluation mode and sees each scene whole.
        """
        from torchmetrics.classification import MulticlassJaccardIndex

        metric = MulticlassJaccardIndex(self.classes, ignore_index=IGNORED).to(self.device)
        for index in range(len(self.test)):
            image, classes = self.test[index]
            found = model(self._prepared(image[None]))["out"].argmax(1)
            metric.update(found, classes[None].to(self.device).long())
        return 100 * float(metric.compute())


def random_part(scene: Scene, crop: tuple[int, int], scales: tuple[float, float], drawn: torch.Generator) -> Scene:
    """Scale a scene at random, take a random part of it and mirror it or not; what lies outside of it is ignored.

    Returns:
        picture (3, *crop) and classes (*crop), both uint8.

    """
    image, classes = scene
    scale, down, across, mirrored = torch.rand(4, generator=drawn).tolist()
    factor = scales[0] + scale * (scales[1] - scales[0])
    # What of the scene will fill the crop, which may be more than there is.
    height, width = (max(1, round(side / factor)) for side in crop)
    below, right = max(0, height - classes.shape[0]), max(0, width - classes.shape[1])
    image = F.pad(image, (0, right, 0, below))
    classes = F.pad(classes, (0, right, 0, below), value=IGNORED)
    top = int(down * (classes.shape[0] - height + 1))
    left = int(across * (classes.shape[1] - width + 1))
    part = image[None, :, top : top + height, left : left + width]
    labels = classes[None, None, top : top + height, left : left + width]
    part = F.interpolate(part, crop, mode="bilinear", antialias=True)[0]
    labels = F.interpolate(labels, crop, mode="nearest-exact")[0, 0]
    return (part.flip(2), labels.flip(1)) if mirrored < 0.5 else (part, labels)


def camvid(root: Path) -> Scenes:
    """CamVid from ``camvid/{train,test}/{images,masks}`` under `root`, into memory.

    Its eleven classes are those of Badrinarayanan et al.; a mask has their numbers, and 11 for pixels of no class.
    """
    known = _table({label: label for label in range(11)})
    splits = []
    for split in ("train", "test"):
        folder = root / "camvid" / split
        masks = {path.stem: path for path in sorted(folder.glob("masks/*.png"))}
        images = sorted(folder.glob("images/*"))
        if not images:
            raise ReplfxError(f"no CamVid in {root}: there is nothing in camvid/{split}/images")
        if missing := [path.name for path in images if path.stem not in masks]:
            raise ReplfxError(f"{folder / 'masks'} has no mask of {missing[0]}")
        splits.append([_scene((image, masks[image.stem]), known) for image in images])
    train, test = splits
    return Scenes(train, test, classes=11, crop=(120, 160), scales=(0.75, 1.5))


def cityscapes(root: Path) -> Scenes:
    """CityScapes from ``cityscapes/{leftImg8bit,gtFine}``; fine labels, 19 classes, the metric on its ``val``."""
    from torchvision.datasets import Cityscapes

    known = _table({each.id: each.train_id for each in Cityscapes.classes if each.id >= 0})
    splits = []
    for split in ("train", "val"):
        try:
            found = Cityscapes(str(root / "cityscapes"), split=split, mode="fine", target_type="semantic")
        except RuntimeError as error:
            raise ReplfxError(f"no CityScapes in {root}: cityscapes/leftImg8bit and gtFine lack {split}") from error
        # In the order of the names: torchvision's is that of the file system.
        pairs = sorted((Path(image), Path(mask)) for image, (mask,) in zip(found.images, found.targets, strict=True))
        splits.append(OnDisk(pairs, partial(_scene, known=known)))
    train, test = splits
    return Scenes(train, test, classes=19, crop=(512, 1024), scales=(0.5, 2.0))


def _table(classes: dict[int, int]) -> Tensor:
    """Label in a file → class, (256,) uint8; all others are ignored."""
    table = torch.full((256,), IGNORED, dtype=torch.uint8)
    for label, number in classes.items():
        table[label] = number
    return table


def _scene(paths: tuple[Path, Path], known: Tensor) -> Scene:
    """Read a picture and its mask.

    Raises:
        ReplfxError: a file is missing, or the mask is no picture of one byte a pixel, or of another size.

    """
    image, mask = pixels(opened(paths[0])), np.array(opened(paths[1]))
    if mask.dtype != np.uint8 or mask.shape != image.shape[1:]:
        raise ReplfxError(f"{paths[1]} is {mask.dtype} {mask.shape}, not a byte for each of {tuple(image.shape[1:])}")
    return image, known[torch.from_numpy(mask).long()]
