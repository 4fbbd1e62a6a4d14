"""One run: a variant of a task trained from a seed. It can be stopped at any step and goes on exactly as it was."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from benchmarks.accuracy.tasks import Subject
from benchmarks.accuracy.variants import Variant
from replfx import ReplfxError
from replfx.measure import clock_for, trainable_parameters

SPAN = 20
"""Steps between two readings of the clock: on an accelerator each reading waits for all that is under way."""


@dataclass
class Progress:
    """How far a run is; what of it is not a tensor of model or optimizer.

    Attributes:
        step: steps taken.
        seconds: training time so far, without evaluations.
        spans: seconds a step, one value a span of steps.
        curve: for each evaluation the step, the training time until then, the mean training loss since the one
            before, and the metric.
        loss: sum of the training losses since the last evaluation.
    """

    step: int = 0
    seconds: float = 0.0
    spans: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    loss: float = 0.0


def prepared(subject: Subject, variant: Variant, seed: int, device: torch.device) -> nn.Module:
    """Build a model from its seed, then change it: what is kept starts alike in all variants.

    Raises:
        ReplfxError: the variant does not fit the model.

    """
    torch.manual_seed(seed)
    model = subject.build().to(device)
    example = subject.data.inputs(subject.data.batch(seed, 0, 2))
    try:
        model = variant.prepare(model.train(), example)
    except ValueError as error:
        raise ReplfxError(f"{variant.name}: {error}") from error
    if subject.data.channels_last:
        model = model.to(memory_format=torch.channels_last)
    # What the variant drew while it was built does not change what is drawn in training.
    torch.manual_seed(seed)
    return model.train()


def scale_rates(optimizer: Optimizer, schedule: LRScheduler, factor: float) -> None:
    """Multiply the learning rate, now and in all that is left of its schedule."""
    for group in optimizer.param_groups:
        for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
            group[key] *= factor
    schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]


@dataclass(frozen=True)
class Speed:
    """What makes a run fast, and rounds otherwise.

    Attributes:
        bf16: run forward under bfloat16 autocast.
        compiler: a backend of torch.compile for the steps, or None for eager; evaluations are eager.
    """

    bf16: bool = False
    compiler: str | None = None

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """What forward runs under."""
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def compiled(self, model: nn.Module) -> nn.Module:
        """What is called in the model's place; its code is compiled as it is called first."""
        if self.compiler is None:
            return model
        compiled: nn.Module = torch.compile(model, backend=self.compiler, dynamic=False)  # type: ignore[assignment]
        return compiled


class Run:
    """A training run, from its beginning or from its checkpoint.

    Args:
        subject: the task at a budget; its data is on `device`.
        variant: what is trained.
        seed: fixes the initial weights, the order of the data and how it is augmented.
        device: where.
        folder: where the checkpoint is kept; None keeps none.
        steps: instead of the recipe's.
        speed: how its steps run.

    Raises:
        ReplfxError: the variant does not fit the model, or the checkpoint is of another run.

    """

    def __init__(
        self,
        subject: Subject,
        variant: Variant,
        seed: int,
        device: torch.device,
        folder: Path | None = None,
        steps: int | None = None,
        speed: Speed = Speed(),
    ) -> None:
        self.subject, self.variant, self.seed, self.device, self.speed = subject, variant, seed, device, speed
        recipe = variant.recipe_of(subject.recipe)
        self.recipe = replace(recipe, steps=steps or recipe.steps)
        self.name = f"{subject.name}/{variant.name}/{seed}"
        self.path = None if folder is None else folder / f"{hashlib.sha256(self.name.encode()).hexdigest()[:16]}.pt"
        self.model = prepared(subject, variant, seed, device)
        self.called = speed.compiled(self.model)
        self.parameters = trainable_parameters(self.model)
        self.clock = clock_for(device)
        self._begin()
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def _begin(self) -> None:
        self.optimizer = self.recipe.optimizer_for(self.model, self.variant.decay)
        self.schedule = self.recipe.schedule_for(self.optimizer)
        self.progress = Progress()
        self._grows_at = [int(share * self.recipe.steps) for share in self.variant.grows_at]
        points = range(1, self.recipe.evaluations + 1)
        self._evaluations = {max(1, self.recipe.steps * k // self.recipe.evaluations) for k in points}
        self._random = self._get_random()

    def restart(self, steps: int) -> None:
        """Begin anew, with so many steps; what is compiled stays compiled. Not for a model that has grown."""
        self.recipe = replace(self.recipe, steps=steps)
        self.model.load_state_dict(prepared(self.subject, self.variant, self.seed, self.device).state_dict())
        self._begin()

    # ---- training

    def train(self, stop: Callable[[int], bool] = lambda step: False, save_every: float = 60.0) -> bool:
        """Train on until the end, or until `stop(steps taken)` says so; a checkpoint is left either way.

        Args:
            stop: asked before every step.
            save_every: seconds between checkpoints.

        Returns:
            whether the run is at its end.

        """
        saved = time.monotonic()
        self._set_random(self._random)
        while self.progress.step < self.recipe.steps and not stop(self.progress.step):
            self._span(stop)
            if self.progress.step in self._evaluations:
                self._evaluate()
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self._random = self._get_random()
        self.save()
        return self.progress.step == self.recipe.steps

    def _span(self, stop: Callable[[int], bool]) -> None:
        """Take a step, and more of them up to a round number, an evaluation, a growth or a stop."""
        first, start = self.progress.step, self.clock()
        if first in self._grows_at:
            self._grow(self._grows_at.index(first))
        losses = torch.zeros((), dtype=torch.float64, device=self.device)
        while True:
            losses += self.step()
            at = self.progress.step
            if at % SPAN == 0 or at in self._evaluations or at in self._grows_at or stop(at):
                break
        self.progress.loss += float(losses)
        seconds = self.clock() - start
        self.progress.seconds += seconds
        self.progress.spans.append(seconds / (self.progress.step - first))

    def step(self) -> Tensor:
        """Take one step; gives its loss."""
        batch = self.subject.data.batch(self.seed, self.progress.step, self.recipe.batch)
        self.optimizer.zero_grad()
        with self.speed.autocast(self.device):
            loss = self.subject.data.loss(self.called, batch)
        loss.backward()
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        with self._warmed():
            self.optimizer.step()
        self.schedule.step()
        self.progress.step += 1
        return loss.detach()

    @contextmanager
    def _warmed(self) -> Iterator[None]:
        """Lower the learning rate for as long as it rises once more after a growth."""
        since = self.progress.step + 1 - max((at for at in self._grows_at if at <= self.progress.step), default=0)
        rising = self.variant.rewarm * self.recipe.steps
        if since >= rising or self.progress.step < min(self._grows_at):
            yield
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= since / rising
        yield
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _grow(self, index: int) -> None:
        assert self.variant.grow is not None
        data = self.subject.data
        example = data.inputs(data.batch(self.seed, self.progress.step, self.recipe.batch))
        self.model = self.variant.grow(self.model, self.optimizer, example, len(self._grows_at) - index).train()
        scale_rates(self.optimizer, self.schedule, self.variant.after)
        if data.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.called = self.speed.compiled(self.model)

    def _evaluate(self) -> None:
        self.model.eval()
        with self.speed.autocast(self.device):
            metric = self.subject.data.metric(self.model, final=self.progress.step == self.recipe.steps)
        self.model.train()
        progress = self.progress
        since = progress.step - int(progress.curve[-1]["step"] if progress.curve else 0)
        point = {"step": progress.step, "seconds": progress.seconds, "loss": progress.loss / since, "metric": metric}
        progress.curve.append(point)
        progress.loss = 0.0

    # ---- checkpoints

    def _identity(self) -> dict[str, Any]:
        return {"name": self.name, "recipe": asdict(self.recipe)}

    def save(self) -> None:
        """Write a checkpoint, beside the old one and then in its place."""
        if self.path is None:
            return
        state = {
            "identity": self._identity(),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": self._get_random(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        torch.save(state, beside)
        beside.replace(self.path)

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["identity"] != self._identity():
            raise ReplfxError(f"{path} is a checkpoint of {state['identity']}, not of {self._identity()}; move it away")
        self.progress = Progress(**state["progress"])
        for index, at in enumerate(self._grows_at):
            if self.progress.step > at:
                self._grow(index)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._random = state["random"]

    def _get_random(self) -> list[Tensor]:
        on_device = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def _set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1].cpu(), self.device)

    def forget(self) -> None:
        """Remove the checkpoint of a run that has its record."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    # ---- what came out

    def record(self, cost: Mapping[str, Any], stamps: Mapping[str, Any]) -> dict[str, Any]:
        """All there is to say of a run that is at its end; plain JSON values.

        Args:
            cost: of a step, as `benchmarks.accuracy.costs` measures it.
            stamps: versions and machine.

        """
        progress = self.progress
        return {
            "name": self.name,
            "kind": "run",
            "subject": self.subject.name,
            "variant": self.variant.name,
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "metric": progress.curve[-1]["metric"],
            "trainable_parameters": self.parameters,
            "step_seconds": median(progress.spans),
            "train_seconds": progress.seconds,
            "clock": "CPU time" if self.clock is time.process_time else "wall time",
            "peak_training_bytes": cost["peak_training_bytes"],
            "curve": progress.curve,
            "environment": dict(stamps),
        }
