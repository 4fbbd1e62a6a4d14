"""Tasks small enough to be trained in a test."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from benchmarks.accuracy.images import Images
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.resnet import ResNet
from benchmarks.accuracy.tasks import ACCURACY, NATS, Subject, Task
from benchmarks.accuracy.text import Text
from benchmarks.models import GPT

CPU = torch.device("cpu")


def images(count: int = 24, size: int = 8) -> Images:
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=drawn)
    labels = torch.randint(10, (count,), generator=drawn)
    return Images(pixels, labels, pixels[:10].clone(), labels[:10].clone())


def text(count: int = 400) -> Text:
    ids = torch.randint(17, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Text(ids, ids[:100], ids[100:200], vocabulary=17, context=8, perplexity=False)


def resnet(depth: int = 26, **recipe: object) -> Subject:
    made = Recipe(**{"steps": 6, "batch": 4, "optimizer": "sgd", "learning_rate": 0.05, "evaluations": 3, **recipe})  # type: ignore[arg-type]
    task = Task("resnet", _unread, ACCURACY, {"small": partial(ResNet, depth, 4)}, {"small": made}, ())
    return Subject(task, "small", made, images())


def gpt(**recipe: object) -> Subject:
    made = Recipe(
        **{"steps": 6, "batch": 4, "optimizer": "adamw", "learning_rate": 1e-2, "clip": 1.0, "evaluations": 3, **recipe}  # type: ignore[arg-type]
    )
    build = partial(GPT, 17, 8, width=8, depth=6, heads=2, dropout=0.1)
    task = Task("gpt", _unread, NATS, {"small": build}, {"small": made}, ())
    return Subject(task, "small", made, text())


def _unread(root: Path) -> Images:
    raise AssertionError("toys are made, not read")
