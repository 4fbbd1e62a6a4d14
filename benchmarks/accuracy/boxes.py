"""Detection: pictures with boxes around things. BCCD in memory, and COCO read from disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from benchmarks.accuracy.files import CPU, OnDisk, Source, made, opened, pixels
from benchmarks.accuracy.seeds import chosen, generator
from replfx import ReplfxError

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
EVALUATED = 8
"""Pictures a batch when the metric is taken."""


@dataclass(frozen=True)
class Things:
    """The boxes of a picture.

    Attributes:
        boxes: (K, 4) float32, left, top, right and bottom in pixels.
        labels: (K,) int64, from 1 on.
        crowd: (K,) int64, 1 where a box is around many things at once, which are not trained on; a detection in
            it counts neither as right nor as wrong.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor

    @classmethod
    def of(cls, found: Sequence[tuple[tuple[float, float, float, float], int, int]]) -> Things:
        """Of each thing its box, its label and whether it is a crowd; boxes of no area are left out."""
        kept = [each for each in found if each[0][2] > each[0][0] and each[0][3] > each[0][1]]
        boxes = torch.tensor([box for box, _, _ in kept], dtype=torch.float32).reshape(-1, 4)
        labels, crowd = (torch.tensor([each[k] for each in kept], dtype=torch.int64) for k in (1, 2))
        return cls(boxes, labels, crowd)

    def trained_on(self) -> Things:
        """Leave crowds out."""
        single = self.crowd == 0
        return Things(self.boxes[single], self.labels[single], self.crowd[single])

    def mirrored(self, width: int) -> Things:
        """The boxes of the picture mirrored left to right."""
        left, top, right, bottom = self.boxes.unbind(1)
        return replace(self, boxes=torch.stack([width - right, top, width - left, bottom], dim=1))


Example = tuple[Tensor, Things]
"""A picture (3, H, W) uint8 and what is on it."""


@dataclass(frozen=True)
class Detections:
    """A detection set; models of it are called as torchvision's detectors are.

    Attributes:
        train, test: the examples; each to train on has a thing that is no crowd. Training mirrors half of them.
        device: where batches are.
    """

    train: Source[Example]
    test: Source[Example]
    device: torch.device = CPU
    channels_last: ClassVar[bool] = True

    def to(self, device: torch.device) -> Detections:
        """Have batches on a device."""
        return replace(self, device=device)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The batch of a step, a function of its arguments alone.

        Returns:
            `size` images (3, H, W) from 0 to 1, and for each its boxes (K, 4) and labels (K,).

        Raises:
            ReplfxError: there are not enough pictures for one batch.

        """
        flips = torch.rand(size, generator=generator(seed, "augmentation", step)) < 0.5

        def seen(place: int, example: Example) -> tuple[Tensor, dict[str, Tensor]]:
            image, things = example
            if flips[place]:
                image, things = image.flip(2), things.mirrored(image.shape[2])
            things = things.trained_on()
            targets = {"boxes": things.boxes.to(self.device), "labels": things.labels.to(self.device)}
            return self._prepared(image), targets

        images, targets = zip(*made(self.train, chosen(len(self.train), seed, step, size), seen), strict=True)
        return list(images), list(targets)

    def _prepared(self, image: Tensor) -> Tensor:
        return image.to(self.device).float() / 255

    @staticmethod
    def inputs(batch: Batch) -> Batch:
        """The images and the targets: in training a detector takes both."""
        return batch

    @staticmethod
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        """The sum of a detector's losses."""
        losses: dict[str, Tensor] = model(*batch)
        return torch.stack(list(losses.values())).sum()

    @torch.no_grad()
    def metric(self, model: nn.Module, final: bool) -> float:
        """COCO's mean average precision on the test pictures, over ten overlaps from 0.5 to 0.95, in percent.

        `model` is in evaluation mode.
        """
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(iou_type="bbox", backend="pycocotools")
        for start in range(0, len(self.test), EVALUATED):
            wanted = range(start, min(start + EVALUATED, len(self.test)))
            images, targets = zip(*made(self.test, wanted, self._tested), strict=True)
            found = [{name: value.cpu() for name, value in each.items()} for each in model(list(images))]
            metric.update(found, list(targets))
        return 100 * float(metric.compute()["map"])

    def _tested(self, place: int, example: Example) -> tuple[Tensor, dict[str, Tensor]]:
        image, things = example
        return self._prepared(image), {"boxes": things.boxes, "labels": things.labels, "iscrowd": things.crowd}


# ---- BCCD

BLOOD = ("RBC", "WBC", "Platelets")
"""Red and white cells, and platelets; the first has label 1."""


def bccd(root: Path) -> Detections:
    """BCCD from ``bccd/BCCD/{JPEGImages,Annotations,ImageSets/Main}`` under `root`, as Pascal VOC has it, into memory.

    Trained on is its ``trainval``, and the metric is taken on its ``test``.
    """
    folder = root / "bccd" / "BCCD"
    splits = []
    for split in ("trainval", "test"):
        listed = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not listed.is_file():
            raise ReplfxError(f"no BCCD in {root}: there is no {listed.relative_to(root)}")
        splits.append([_voc(folder, name) for name in listed.read_text().split()])
    train, test = splits
    return Detections([each for each in train if len(each[1].labels)], test)


def _voc(folder: Path, name: str) -> Example:
    """Read a picture and its annotation.

    Raises:
        ReplfxError: one of them is missing, or a label is none of `BLOOD`.

    """
    image = pixels(opened(folder / "JPEGImages" / f"{name}.jpg"))
    path = folder / "Annotations" / f"{name}.xml"
    if not path.is_file():
        raise ReplfxError(f"{path} is missing; is the data set complete?")
    found = []
    for thing in ElementTree.parse(path).iter("object"):
        label = thing.findtext("name", "")
        if label not in BLOOD:
            raise ReplfxError(f"{path} has a {label!r}; there are {', '.join(BLOOD)}")
        left, top, right, bottom = (float(thing.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
        # Pascal VOC counts pixels from 1, the last one included.
        box = (max(0.0, left - 1), max(0.0, top - 1), min(right, image.shape[2]), min(bottom, image.shape[1]))
        found.append((box, 1 + BLOOD.index(label), 0))
    return image, Things.of(found)


# ---- COCO


def coco(root: Path) -> Detections:
    """COCO from ``coco/{train2017,val2017,annotations}`` under `root`; labels are its own, from 1 to 90.

    The metric is taken on ``val2017``.
    """
    train, test = (_coco_split(root / "coco", f"{split}2017") for split in ("train", "val"))
    return Detections(_read_later(each for each in train if len(each[1].trained_on().labels)), _read_later(test))


def _read_later(examples: Iterable[tuple[Path, Things]]) -> OnDisk[tuple[Path, Things], Example]:
    return OnDisk(list(examples), _with_pixels)


def _with_pixels(example: tuple[Path, Things]) -> Example:
    path, things = example
    return pixels(opened(path)), things


def _coco_split(folder: Path, split: str) -> list[tuple[Path, Things]]:
    from pycocotools.coco import COCO

    annotations = folder / "annotations" / f"instances_{split}.json"
    if not annotations.is_file():
        raise ReplfxError(f"no COCO in {folder.parent}: there is no {annotations.relative_to(folder.parent)}")
    with redirect_stdout(StringIO()):  # it says how long it takes
        index = COCO(str(annotations))
    return [
        (folder / split / index.imgs[key]["file_name"], _coco_things(index.imgToAnns[key]))
        for key in sorted(index.imgs)
    ]


def _coco_things(annotations: Iterable[dict[str, Any]]) -> Things:
    found = []
    for each in annotations:
        left, top, width, height = each["bbox"]
        found.append(((left, top, left + width, top + height), each["category_id"], each["iscrowd"]))
    return Things.of(found)
