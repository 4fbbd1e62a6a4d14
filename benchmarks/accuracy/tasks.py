"""The tasks: data, a model, and a recipe for each budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.accuracy.boxes import BLOOD, bccd, coco
from benchmarks.accuracy.data import Data
from benchmarks.accuracy.dense import fcn_resnet50, fcos_resnet50, small_fcn, small_fcos
from benchmarks.accuracy.images import Images, cifar10, fashion_mnist, stl10, svhn
from benchmarks.accuracy.photos import imagenet
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.resnet import ResNet, classifier
from benchmarks.accuracy.scenes import camvid, cityscapes
from benchmarks.accuracy.text import Text, python_bytes, wikitext2, wikitext2_bytes, wikitext2_bytes_narrow
from benchmarks.models import convnext, vision_transformer
from replfx import ReplfxError
from replfx.demo.model import GPT

BUDGETS = ("small", "full")


@dataclass(frozen=True)
class Metric:
    """What a task is judged by."""

    name: str
    higher_is_better: bool


ACCURACY = Metric("test accuracy, %", higher_is_better=True)
IOU = Metric("test mIoU, %", higher_is_better=True)
PRECISION = Metric("test mAP, %", higher_is_better=True)
PERPLEXITY = Metric("test perplexity", higher_is_better=False)
NATS = Metric("validation loss, nats a byte", higher_is_better=False)


@dataclass(frozen=True)
class Task:
    """What is learned, and by what.

    Attributes:
        name: as on the command line.
        load: reads the data from the folder that holds all sets.
        metric: what it is judged by.
        models: budget → builds the model; what is no work for a CPU has no small one.
        recipes: budget → how it is trained, of the same budgets.
        variants: what is compared where nothing else is asked for.
    """

    name: str
    load: Callable[[Path], Data]
    metric: Metric
    models: Mapping[str, Callable[[], nn.Module]]
    recipes: Mapping[str, Recipe]
    variants: tuple[str, ...]


FRAME = (
    "full",
    "removed",
    "block+scalar",
    "block+channel",
    "light+scalar",
    "light+channel",
    "rule2024",
    "removed:every=4",
    "stochastic-depth",
    "layerdrop",
    "sharing",
    "stacking",
    "checkpointing",
    "same-time:as=removed",
)
"""All of issue 4's frame: the bounds, replfx's operators, and the peers."""

TURNS = (
    "full",
    *(
        f"{how}:select={blocks}"
        for blocks in ("layer1.2,layer2.2", "layer1.3,layer2.3", "layer2.0,layer3.0", "layer2.2,layer3.2")
        for how in ("block+scalar", "removed")
    ),
)
"""Of a ResNet with four blocks a stage, two blocks each time: inside a stage between two of their own shapes; at its
end, before a change of shape; the blocks that change the shape; and again inside, in the stages that these begin."""

# He et al., section 4.2: 64,000 iterations, the learning rate divided by 10 at 32,000 and 48,000.
HE = Recipe(64_000, 128, "sgd", 0.1, "decay", weight_decay=1e-4, evaluations=64)
SMALL_IMAGES = Recipe(780, 256, "sgd", 0.2, weight_decay=5e-4, evaluations=8)
SMALL_TEXT = Recipe(3_000, 16, "adamw", 4e-3, weight_decay=0.01, clip=1.0, evaluations=10)

# Twenty passes over STL-10's images, of which there are few.
SMALL_PHOTOS = replace(SMALL_IMAGES, batch=128, learning_rate=0.1)
# Of the learning rates 1e-3, 2e-3 and 5e-3 the last is full's best after 300 steps on CamVid (with nine blocks a
# stage), and of 1e-3, 2e-3 and 4e-3 the last after 250 on BCCD, each by little.
SMALL_SCENES = Recipe(1_600, 8, "adamw", 5e-3, weight_decay=0.01, evaluations=6)
SMALL_BOXES = Recipe(800, 8, "adamw", 4e-3, weight_decay=0.01, clip=1.0, evaluations=6)
# Rates and decay near torchvision's own for these models, but more passes: they start from random weights.
FULL_SCENES = Recipe(11_000, 16, "sgd", 0.02, weight_decay=1e-4, evaluations=20)
FULL_BOXES = Recipe(190_000, 16, "sgd", 0.01, weight_decay=1e-4, clip=10.0, evaluations=12)

# Two and a half passes over the images: a minute of one core, evaluations aside.
# Of the learning rates 0.1, 0.2, 0.4 and 0.8, 0.4 is full's best after 240 steps (docs/heterogeneous.md).
SMALL_TURNS = replace(SMALL_IMAGES, steps=480, learning_rate=0.4, evaluations=4)


# Ten passes (eight and a half over Fashion-MNIST): minutes of one core, after which depth matters (docs/findings.md).
# Of the learning rates 0.2, 0.4 and 0.8, 0.4 is full's best on Fashion-MNIST after 500 steps.
SMALL_DEPTH = replace(SMALL_IMAGES, steps=2_000, learning_rate=0.4, evaluations=4)


def _resnet(name: str, depth: int, small_depth: int, small_width: int) -> Task:
    models = {"small": partial(ResNet, small_depth, small_width, stride=2), "full": partial(ResNet, depth)}
    return Task(name, cifar10, ACCURACY, models, {"small": SMALL_DEPTH, "full": HE}, FRAME)


def _narrow(name: str, load: Callable[[Path], Data], *, scaled: bool = False) -> Task:
    models = {"small": partial(GPT, 256, 64, width=32, depth=12, heads=2, scaled=scaled)}
    recipe = Recipe(5_000, 16, "adamw", 4e-3, "plateau", weight_decay=0.1, clip=1.0, beta2=0.95)
    return Task(name, load, NATS, models, {"small": recipe}, FRAME)


def _imagenet_resnet50() -> nn.Module:
    from torchvision.models import resnet50

    model: nn.Module = resnet50(weights=None)
    return model


TASKS = {
    task.name: task
    for task in (
        _resnet("cifar10-resnet20", 20, small_depth=20, small_width=8),
        _resnet("cifar10-resnet32", 32, small_depth=32, small_width=4),
        _resnet("cifar10-resnet110", 110, small_depth=56, small_width=4),
        Task(
            "cifar10-vit",
            cifar10,
            ACCURACY,
            {
                "small": partial(vision_transformer, 32, 8, 3, 10, width=64, depth=8),
                "full": partial(vision_transformer, 32, 4, 3, 10, width=192, depth=12),
            },
            {
                "small": Recipe(1_500, 128, "adamw", 2e-3, weight_decay=0.05, clip=1.0, evaluations=8),
                "full": Recipe(78_000, 128, "adamw", 1e-3, weight_decay=0.05, clip=1.0, evaluations=50),
            },
            FRAME,
        ),
        Task(
            "cifar10-convnext",
            cifar10,
            ACCURACY,
            {
                "small": partial(convnext, 10, width=32, depth=12),
                "full": partial(convnext, 10, width=192, depth=18),
            },
            {
                "small": Recipe(
                    2_500, 64, "adamw", 4e-3, "plateau", weight_decay=0.05, clip=1.0, beta2=0.95, evaluations=8
                ),
                "full": Recipe(78_000, 128, "adamw", 1e-3, weight_decay=0.05, clip=1.0, evaluations=50),
            },
            FRAME,
        ),
        Task(
            "fashion-mnist",
            fashion_mnist,
            ACCURACY,
            {
                "small": partial(ResNet, 20, 4, channels=1, stride=2),
                "full": partial(ResNet, 56, 8, channels=1),
            },
            {
                "small": SMALL_DEPTH,
                "full": replace(HE, steps=32_000, evaluations=32),
            },
            FRAME,
        ),
        Task(
            "wikitext2",
            wikitext2,
            PERPLEXITY,
            {
                "small": partial(GPT, 33_278, 128, width=64, depth=8, heads=4, tied=True),
                "full": partial(GPT, 33_278, 128, width=256, depth=12, heads=8, tied=True, dropout=0.3),
            },
            {
                "small": replace(SMALL_TEXT, steps=300, evaluations=5),
                "full": replace(SMALL_TEXT, steps=20_000, batch=64, learning_rate=1e-3, weight_decay=0.1),
            },
            FRAME,
        ),
        Task(
            "wikitext2-bytes",
            wikitext2_bytes,
            NATS,
            {
                "small": partial(GPT, 256, 128, width=64, depth=12, heads=4),
                "full": partial(GPT, 256, 128, width=256, depth=24, heads=8),
            },
            {"small": SMALL_TEXT, "full": replace(SMALL_TEXT, steps=30_000, batch=64, learning_rate=1e-3)},
            FRAME,
        ),
        _narrow("bytes-narrow", wikitext2_bytes_narrow),
        _narrow("bytes-narrow-scaled", wikitext2_bytes_narrow, scaled=True),
        _narrow("python-bytes", python_bytes),
        _narrow("python-bytes-scaled", python_bytes, scaled=True),
        Task(
            "svhn",
            svhn,
            ACCURACY,
            {"small": partial(ResNet, 32, 8, stride=2), "full": partial(ResNet, 32)},
            {"small": SMALL_IMAGES, "full": HE},
            FRAME,
        ),
        Task(
            "stl10",
            stl10,
            ACCURACY,
            {"small": partial(classifier, 8, (5, 5, 5), 10), "full": partial(classifier, 64, (3, 4, 6, 3), 10)},
            {"small": SMALL_PHOTOS, "full": replace(HE, steps=8_000, evaluations=20)},
            FRAME,
        ),
        Task(
            "imagenet",
            imagenet,
            ACCURACY,
            {"full": _imagenet_resnet50},
            {"full": Recipe(450_000, 256, "sgd", 0.1, "decay", weight_decay=1e-4, evaluations=30)},
            FRAME,
        ),
        Task(
            "camvid-fcn",
            camvid,
            IOU,
            {"small": partial(small_fcn, 11), "full": partial(fcn_resnet50, 11)},
            {"small": SMALL_SCENES, "full": FULL_SCENES},
            FRAME,
        ),
        Task(
            "cityscapes",
            cityscapes,
            IOU,
            {"full": partial(fcn_resnet50, 19)},
            {"full": replace(FULL_SCENES, steps=40_000)},
            FRAME,
        ),
        Task(
            "bccd-fcos",
            bccd,
            PRECISION,
            {"small": partial(small_fcos, 1 + len(BLOOD)), "full": partial(fcos_resnet50, 1 + len(BLOOD))},
            {"small": SMALL_BOXES, "full": replace(FULL_BOXES, steps=5_000)},
            FRAME,
        ),
        Task(
            "coco",
            coco,
            PRECISION,
            {"full": partial(fcos_resnet50, 91)},
            {"full": FULL_BOXES},
            FRAME,
        ),
        Task(
            "turns",
            cifar10,
            ACCURACY,
            {"small": partial(ResNet, 26, 8, stride=2), "full": partial(ResNet, 26)},
            {"small": SMALL_TURNS, "full": HE},
            TURNS,
        ),
    )
}


@dataclass(frozen=True)
class Subject:
    """A task at a budget: what a run is made of.

    Attributes:
        task, budget: which; `budget` also names what of its recipe was changed ("small,learning_rate=0.4").
        recipe: how it is trained.
        data: on the device.
    """

    task: Task
    budget: str
    recipe: Recipe
    data: Data

    @property
    def name(self) -> str:
        """What the records are filed under."""
        return f"{self.task.name}/{self.budget}"

    def build(self) -> nn.Module:
        """Build the untouched model from PyTorch's random state."""
        return self.task.models[self.budget.partition(",")[0]]()


def subject_of(task: str, budget: str, settings: list[str], root: Path, device: torch.device) -> Subject:
    """Read a task's data and choose its recipe.

    Raises:
        ReplfxError: a budget that the task lacks, a setting of the recipe that does not exist, or data that is not
            there.

    """
    chosen = TASKS[task]
    if budget not in chosen.recipes:
        raise ReplfxError(f"{task} has no budget {budget}: ask for --budget {' or '.join(chosen.recipes)}")
    recipe = chosen.recipes[budget].changed(settings)
    if not root.is_dir():
        raise ReplfxError(f"--data-root {root}: there is no such folder")
    data = chosen.load(root)
    if recipe.examples:
        if not isinstance(data, Images | Text):
            raise ReplfxError(f"{task}: --set examples= is for images and texts")
        data = data.part(recipe.examples)
    return Subject(chosen, ",".join([budget, *sorted(settings)]), recipe, data.to(device))
