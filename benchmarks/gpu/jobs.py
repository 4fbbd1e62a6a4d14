"""What the processes do: train one variant of one task, or take steps of one model compiled one way."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.images import Images
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.resnet import ResNet
from benchmarks.accuracy.tasks import ACCURACY, NATS, Subject, Task
from benchmarks.accuracy.text import Text
from benchmarks.accuracy.training import Run, Speed
from benchmarks.accuracy.variants import variant_of
from benchmarks.compiling.command import launches
from benchmarks.compiling.subjects import SUBJECTS, Way, training_of
from benchmarks.gpu.workers import Record, Say, step_costs
from replfx.demo.model import GPT
from replfx.measure import Training, trainable_parameters

LANGUAGE, SMALL_IMAGES = "python", ("resnet20", "resnet56")
_WARM = 4  # steps before anything is timed: of them the first compiles

CONTEXT = {False: 512, True: 32}
"""Bytes that the language model sees, by whether it is to be quick."""

# A plateau: what a model gains when it grows is still trained at the highest rate.
_TEXT = Recipe(20_000, 32, "adamw", 1e-3, "plateau", weight_decay=0.1, clip=1.0, beta2=0.95, evaluations=20)
_IMAGES = Recipe(8_000, 128, "sgd", 0.1, "plateau", weight_decay=5e-4, evaluations=10)

# Rates are not tuned at this scale, but for full's, which has two. The others' are as the demo found them beside
# full's: the same or a little more for what grows, half for what shares to the end.
VARIANTS = {
    LANGUAGE: (
        "full:lr=1e-3",
        "full:lr=2e-3",
        "block+scalar:unroll=0.2:lr=2e-3",
        "block+scalar:lr=1e-3",
        "removed:lr=2e-3",
        "stacking:at=0.5:lr=2e-3",
    ),
    **dict.fromkeys(SMALL_IMAGES, ("full", "block+scalar:unroll=0.2", "block+scalar", "removed", "stacking:at=0.5")),
}

QUICK = {LANGUAGE: (0, 2, 5), "resnet20": (0, 1, 4)}
"""Which of the variants are enough to see that all runs: whole, unrolled, grown."""

STEP_WAYS = (
    Way("Inductor full", None, "inductor"),
    Way("Inductor removed", "identity", "inductor"),
    Way("Inductor block", "block", "inductor"),
    Way("Inductor mixer", "mixer", "inductor"),
    Way("backend block", "block", "replfx"),
    Way("backend mixer", "mixer", "replfx"),
)


def subject_of(task: str, stored: Path, device: torch.device, quick: bool) -> Subject:
    """A task at its scale: data that was stored before, model, recipe.

    The language model has 28 M parameters; a quick one is of the same depth in blocks that are replaced.
    """
    content = torch.load(stored, map_location=device, weights_only=True)
    if task == LANGUAGE:
        data = Text(**content)
        model = partial(GPT, 256, CONTEXT[quick], *((32, 5, 2) if quick else (448, 12, 7)), scaled=True)
        recipe = replace(_TEXT, batch=4, evaluations=3) if quick else _TEXT
        return Subject(Task(task, lambda _: data, NATS, {"gpu": model}, {"gpu": recipe}, ()), "gpu", recipe, data)
    images = Images(**content)
    if quick:
        tensors: dict[str, Any] = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        images = Images(**{name: each[:: max(1, len(each) // 500)] for name, each in tensors.items()})
    depth = int(task.removeprefix("resnet"))
    net = partial(ResNet, depth, 4, stride=2) if quick else partial(ResNet, depth)
    recipe = replace(_IMAGES, batch=16, evaluations=2) if quick else _IMAGES
    return Subject(Task(task, lambda _: images, ACCURACY, {"gpu": net}, {"gpu": recipe}, ()), "gpu", recipe, images)


@dataclass(frozen=True)
class Learning:
    """Train one variant.

    Attributes:
        task, variant: which.
        stored: the data.
        device, quick: where, and whether small.
        speed: how steps run.
        folder: for its checkpoint.
        steps: as many as it had when it was stopped; None where they are yet to be said.
    """

    task: str
    variant: str
    stored: Path
    device: str
    quick: bool
    speed: Speed
    folder: Path
    steps: int | None = None

    @property
    def name(self) -> str:
        """Of its record."""
        return f"{self.task}/{self.variant}"

    def prepare(self) -> PreparedRun:
        """Build the model, or read its checkpoint; compile it."""
        device = torch.device(self.device)
        torch.set_float32_matmul_precision("high")
        subject = subject_of(self.task, self.stored, device, self.quick)
        run = Run(subject, variant_of(self.variant), 0, device, self.folder, self.steps, self.speed)
        if run.progress.step == 0:
            for _ in range(_WARM):
                run.step()
            run.restart(run.recipe.steps)
        return PreparedRun(run)


@dataclass
class PreparedRun:
    """A run that has been compiled."""

    run: Run

    def timed(self) -> Record:
        """What a step costs; the run begins anew."""
        run = self.run
        figures = step_costs(run.step, run.model, run.optimizer, run.device, 5 if run.device.type == "cpu" else 20)
        run.restart(run.recipe.steps)
        return {**figures, "trainable_parameters": run.parameters}

    def work(self, steps: int, deadline: float, say: Say) -> tuple[str, Record]:
        """Train; a checkpoint is left at the deadline."""
        run, told = self.run, 0
        if run.progress.step == 0:
            run.restart(steps)

        def late(step: int) -> bool:
            nonlocal told
            if len(run.progress.curve) > told:
                told = len(run.progress.curve)
                say("point", {"steps": steps, "at": step, "curve": run.progress.curve})
            return time.time() > deadline

        ended = run.train(late)
        if ended:
            run.forget()
        record = {"steps": steps, "at": run.progress.step, "curve": run.progress.curve, "recipe": asdict(run.recipe)}
        return "done" if ended else "cut", record


@dataclass(frozen=True)
class Stepping:
    """Take steps of one model, replaced and compiled one way."""

    model: str
    way: Way
    device: str
    quick: bool
    batch: int

    @property
    def name(self) -> str:
        """Of its record."""
        return f"{self.model}/{self.way.name}"

    def prepare(self) -> PreparedSteps:
        """Build and compile."""
        device = torch.device(self.device)
        subject, bf16 = SUBJECTS[self.model], device.type == "cuda"
        training = training_of(subject, self.way, "auto", device, batch=self.batch, quick=self.quick, bf16=bf16)
        for _ in range(_WARM):
            training.step()
        return PreparedSteps(training)


@dataclass
class PreparedSteps:
    """A model that has been compiled."""

    training: Training

    def timed(self) -> Record:
        """What a step costs."""
        training = self.training
        figures = step_costs(training.step, training.model, training.optimizer, training.device, 5)
        return {
            **figures,
            "launches": launches(training.step, training.device),
            "trainable_parameters": trainable_parameters(training.model),
        }

    def work(self, steps: int, deadline: float, say: Say) -> tuple[str, Record]:
        """Nothing: it is there to be timed."""
        return "done", {}
