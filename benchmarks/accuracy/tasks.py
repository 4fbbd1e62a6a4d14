"""The tasks: data, a model, and a recipe for each budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.accuracy.images import Images, cifar10, fashion_mnist
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.resnet import ResNet
from benchmarks.accuracy.text import Text, wikitext2, wikitext2_bytes
from benchmarks.models import GPT
from replfx import ReplfxError
from replfx.demo.models import vision_transformer

BUDGETS = ("small", "full")
Data = Images | Text


@dataclass(frozen=True)
class Metric:
    """What a task is judged by."""

    name: str
    higher_is_better: bool


ACCURACY = Metric("test accuracy, %", higher_is_better=True)
PERPLEXITY = Metric("test perplexity", higher_is_better=False)
NATS = Metric("validation loss, nats a byte", higher_is_better=False)


@dataclass(frozen=True)
class Task:
    """What is learned, and by what.

    Attributes:
        name: as on the command line.
        load: reads the data from the folder that holds all sets.
        metric: what it is judged by.
        models: budget → builds the model.
        recipes: budget → how it is trained.
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


# Two and a half passes over the images: a minute of one core, evaluations aside.
# Of the learning rates 0.1, 0.2, 0.4 and 0.8, 0.4 is full's best after 240 steps (docs/heterogeneous.md).
SMALL_TURNS = replace(SMALL_IMAGES, steps=480, learning_rate=0.4, evaluations=4)


def _resnet(name: str, depth: int, small_depth: int) -> Task:
    models = {"small": partial(ResNet, small_depth, 8, stride=2), "full": partial(ResNet, depth)}
    return Task(name, cifar10, ACCURACY, models, {"small": SMALL_IMAGES, "full": HE}, FRAME)


TASKS = {
    task.name: task
    for task in (
        _resnet("cifar10-resnet20", 20, small_depth=20),
        _resnet("cifar10-resnet32", 32, small_depth=32),
        _resnet("cifar10-resnet110", 110, small_depth=56),
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
            "fashion-mnist",
            fashion_mnist,
            ACCURACY,
            {
                "small": partial(ResNet, 56, 4, channels=1, stride=2),
                "full": partial(ResNet, 56, 8, channels=1),
            },
            {
                "small": SMALL_IMAGES,
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
        ReplfxError: a setting of the recipe that does not exist, or data that is not there.

    """
    chosen = TASKS[task]
    recipe = chosen.recipes[budget].changed(settings)
    if not root.is_dir():
        raise ReplfxError(f"--data-root {root}: there is no such folder")
    return Subject(chosen, ",".join([budget, *sorted(settings)]), recipe, chosen.load(root).to(device))
