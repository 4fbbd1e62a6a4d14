"""Recipes: how long a task is trained, with which optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from replfx import ReplfxError
from replfx.live import syntheses_of

Schedule = Literal["one-cycle", "decay", "plateau"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for all variants of a task.

    Attributes:
        steps: optimizer steps.
        batch: examples a step.
        optimizer: SGD with momentum 0.9, or AdamW.
        learning_rate: the highest of the schedule.
        schedule: "one-cycle" goes up and down again over all steps; "decay" divides by 10 after a half and after
            three quarters of them, as He et al. do; "plateau" goes up over a tenth of them, stays, and falls to zero
            over the last fifth (warmup-stable-decay, arXiv 2404.06395), so that what a model gains on the way is
            still trained at the highest rate.
        weight_decay: of all parameters.
        clip: norm that gradients are cut to; None leaves them.
        beta2: AdamW's second decay rate.
        evaluations: how often the metric is taken, the last time at the end.
        examples: how many images, or windows of a text, it is trained on; 0 for all.
    """

    steps: int
    batch: int
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    schedule: Schedule = "one-cycle"
    weight_decay: float = 0.0
    clip: float | None = None
    beta2: float = 0.999
    evaluations: int = 10
    examples: int = 0

    def optimizer_for(self, model: nn.Module, decay: float = 1.0) -> Optimizer:
        """Make the optimizer of the trainable parameters; `decay` scales what the fusion coefficients have of it."""
        trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
        mixers = {p for layer in syntheses_of(model).values() if layer.fusion for p in layer.fusion.parameters()}
        if decay != 1.0 and mixers:
            trained = [
                {"params": [p for p in trained if p not in mixers]},
                {"params": [p for p in trained if p in mixers], "weight_decay": decay * self.weight_decay},
            ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        betas = (0.9, self.beta2)
        return torch.optim.AdamW(trained, self.learning_rate, betas, weight_decay=self.weight_decay, fused=True)

    def schedule_for(self, optimizer: Optimizer) -> LRScheduler:
        """Make the schedule, which is advanced once a step."""
        if self.schedule == "decay":
            return MultiStepLR(optimizer, [self.steps // 2, self.steps * 3 // 4])
        if self.schedule == "plateau":
            return LambdaLR(optimizer, lambda step: min(1, 10 * (step + 1) / self.steps, 5 * (1 - step / self.steps)))
        return OneCycleLR(optimizer, self.learning_rate, total_steps=self.steps)

    def changed(self, settings: Iterable[str]) -> Recipe:
        """The same with some fields set, each as "name=value".

        Raises:
            ReplfxError: there is no such field, or it takes no such value.

        """
        changes: dict[str, object] = {}
        kinds: dict[str, Callable[[str], object]] = {
            "steps": int,
            "batch": int,
            "evaluations": int,
            "examples": int,
            "learning_rate": float,
            "weight_decay": float,
            "beta2": float,
            "schedule": _schedule,
        }
        for setting in settings:
            name, _, value = setting.partition("=")
            kind = kinds.get(name)
            if kind is None:
                raise ReplfxError(f"--set {setting}: there are {', '.join(kinds)}")
            try:
                changes[name] = kind(value)
            except ValueError:
                takes = " or ".join(get_args(Schedule)) if kind is _schedule else kind.__name__
                raise ReplfxError(f"--set {setting}: {name} takes {takes}, not {value!r}") from None
        return replace(self, **changes)  # type: ignore[arg-type]


def _schedule(text: str) -> str:
    if text not in get_args(Schedule):
        raise ValueError(text)
    return text
