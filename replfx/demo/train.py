"""Train one variant of the demo's model from one seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from replfx.demo.model import GPT
from replfx.demo.text import CONTEXT, Text
from replfx.measure import Training, clock_for, trainable_parameters

BATCH, WIDTH, DEPTH, HEADS = 16, 32, 12, 2


@dataclass(frozen=True)
class Variant:
    """What becomes of every second block.

    Attributes:
        name: as tables and plots have it.
        operator: takes the place of these blocks; None leaves the model as it is.
        learning_rate: 8e-3 is full depth's best of 4e-3, 8e-3 and 1.6e-2 with a seed that the demo does not take.
        unroll_at: share of its steps after which these blocks are back, as copies of their neighbours.
        length: its steps, as a share of full depth's: what saves time on a step takes as many more of them.
    """

    name: str
    operator: str | None
    learning_rate: float
    unroll_at: float | None = None
    length: float = 1.0

    def steps_of(self, steps: int) -> int:
        """How many steps it takes, where full depth takes so many."""
        return round(self.length * steps)

    def prepare(self, seed: int) -> nn.Module:
        """Build the model from its seed; what is kept starts alike in all variants."""
        torch.manual_seed(seed)
        model: nn.Module = GPT(256, CONTEXT, width=WIDTH, depth=DEPTH, heads=HEADS)
        if self.operator is None:
            return model
        example = torch.zeros(2, CONTEXT, dtype=torch.long)
        return replfx.transform(model, example, operator=self.operator)


VARIANTS = (
    Variant("full depth", None, 8e-3),
    Variant("left out until 0.6", "identity", 8e-3, unroll_at=0.6, length=1.33),
    Variant("left out", "identity", 8e-3, length=1.6),
    Variant("shared", "block", 8e-3),
)


@dataclass
class Run:
    """What came of one run."""

    parameters: tuple[int, int]  # trainable ones at the start and at the end
    # At each evaluation: the steps taken, the training time until then, and the held-out loss in nats a byte.
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    switched: float | None = None  # the training time at which blocks were unrolled


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW, as the demo trains with it."""
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each window's bytes after the first, in nats a byte."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def training_of(variant: Variant, text: Text, device: torch.device) -> Training:
    """Set a variant up for its cost to be measured."""
    model = variant.prepare(0).to(device)
    windows = text.batch(BATCH, torch.Generator().manual_seed(0)).to(device)
    return Training(model, optimizer_of(model, variant.learning_rate), lambda: loss_of(model, windows), device)


def train(
    variant: Variant, text: Text, seed: int, steps: int, device: torch.device, on_step: Callable[[], object]
) -> Run:
    """Train from a seed, which fixes the initial weights and the order of the text.

    The learning rate rises over a tenth of the steps, stays, and falls to zero over the last fifth.
    """
    steps = variant.steps_of(steps)
    model = variant.prepare(seed).to(device)
    optimizer = optimizer_of(model, variant.learning_rate)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps, 5 * (1 - step / steps))
    )
    unrolls = None
    if variant.unroll_at is not None:
        unrolls = replfx.Schedule(model, optimizer, unroll_at=variant.unroll_at, total_steps=steps, start="copies")
    generator, held_out = torch.Generator().manual_seed(seed), text.windows().to(device)
    before, marks = trainable_parameters(model), {max(1, steps * k // 12) for k in range(1, 13)}
    run, seconds, clock = Run((before, before)), 0.0, clock_for(device)
    for step in range(1, steps + 1):
        started = clock()
        optimizer.zero_grad()
        loss_of(model, text.batch(BATCH, generator).to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        unrolled = unrolls.step() if unrolls is not None else []
        seconds += clock() - started
        if unrolled:
            run.switched = seconds
        if step in marks:
            run.steps.append(step)
            run.seconds.append(seconds)
            run.losses.append(evaluate(model, held_out))
        on_step()
    run.parameters = (before, trainable_parameters(model))
    return run


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    """The loss on all windows, in nats a byte."""
    model.eval()
    total = sum(len(part) * loss_of(model, part).item() for part in windows.split(64))
    model.train()
    return total / len(windows)
