"""Tasks small enough to be trained in a test."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from benchmarks.accuracy.boxes import Detections, Things
from benchmarks.accuracy.images import Images
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.resnet import ResNet
from benchmarks.accuracy.scenes import Scenes
from benchmarks.accuracy.tasks import ACCURACY, IOU, NATS, PRECISION, Subject, Task
from benchmarks.accuracy.text import Text
from replfx.demo.model import GPT

CPU = torch.device("cpu")
DENSE = Recipe(4, 2, "adamw", 1e-3, clip=1.0, evaluations=2)


def images(size: int = 8) -> Images:
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 3, size, size), dtype=torch.uint8, generator=drawn)
    labels = torch.randint(10, (24,), generator=drawn)
    return Images(pixels, labels, pixels[:10].clone(), labels[:10].clone())


def text(count: int = 400) -> Text:
    ids = torch.randint(17, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Text(ids, ids[:100], ids[100:200], vocabulary=17, context=8, perplexity=False)


def resnet(**recipe: object) -> Subject:
    made = Recipe(**{"steps": 6, "batch": 4, "optimizer": "sgd", "learning_rate": 0.05, "evaluations": 3, **recipe})
    task = Task("resnet", _unread, ACCURACY, {"small": partial(ResNet, 20, 4)}, {"small": made}, ())
    return Subject(task, "small", made, images())


def gpt(**recipe: object) -> Subject:
    made = Recipe(
        **{"steps": 6, "batch": 4, "optimizer": "adamw", "learning_rate": 1e-2, "clip": 1.0, "evaluations": 3, **recipe}
    )
    build = partial(GPT, 17, 8, width=8, depth=6, heads=2, dropout=0.1)
    task = Task("gpt", _unread, NATS, {"small": build}, {"small": made}, ())
    return Subject(task, "small", made, text())


def fcn() -> Subject:
    from benchmarks.accuracy.dense import small_fcn

    drawn = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (6, 3, 40, 56), dtype=torch.uint8, generator=drawn)
    classes = torch.randint(5, (6, 40, 56), dtype=torch.uint8, generator=drawn)
    data = Scenes(list(zip(pictures, classes, strict=True)), [(pictures[0], classes[0])], 5, (32, 48), (0.75, 1.5))
    build = partial(small_fcn, 5, width=4, blocks=3)
    task = Task("fcn", _unread, IOU, {"small": build}, {"small": DENSE}, ())
    return Subject(task, "small", DENSE, data)


def fcos() -> Subject:
    from benchmarks.accuracy.dense import small_fcos

    drawn = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (6, 3, 48, 64), dtype=torch.uint8, generator=drawn)
    things = Things.of([((4.0, 8.0, 30.0, 40.0), 1, 0), ((20.0, 4.0, 60.0, 24.0), 2, 0)])
    data = Detections([(picture, things) for picture in pictures], [(pictures[0], things)])
    build = partial(small_fcos, 3, width=16, blocks=3, side=48)
    task = Task("fcos", _unread, PRECISION, {"small": build}, {"small": DENSE}, ())
    return Subject(task, "small", DENSE, data)


def _unread(root: Path) -> Images:
    raise AssertionError("toys are made, not read")
