"""What does a training step cost: full, removed, and with each operator and fusion?"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import replfx
from benchmarks.common import add_device_argument, device_of, first_reason, in_training, model_names
from benchmarks.models import SUBJECTS
from benchmarks.output import Row, tables, write
from replfx import ReplfxError
from replfx.measure import StepCost, Training, environment, pairwise_ratios, saving_kept, training_costs


@dataclass(frozen=True)
class Variant:
    """How the blocks are replaced; without an operator the model is left whole.

    Attributes:
        name: of the row.
        operator: of the replaced blocks.
        fusion: the same.
        once: whether the micro-batches of a step share one synthesis.
    """

    name: str
    operator: str | None = None
    fusion: str = "scalar"
    once: bool = False


FULL = Variant("full")
REMOVED = Variant("removed", "identity")
OPERATORS = ("block", "mixer", "light")
FUSIONS = ("scalar", "scalar_layer", "channel")
VARIANTS = (FULL, REMOVED, *(Variant(f"{o} {f}", o, f) for o in OPERATORS for f in FUSIONS))
ONCE = Variant("block scalar, once", "block", "scalar", once=True)
WARMUP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add, names = parser.add_argument, partial(model_names, known=SUBJECTS)
    add("--models", type=names, default=list(SUBJECTS), metavar="NAME,…", help=f"of {', '.join(SUBJECTS)} (all)")
    add_device_argument(parser)
    add("--bf16", action="store_true", help="run forward under bfloat16 autocast")
    add("--every", type=int, default=2, metavar="K", help="replace every K-th block")
    add("--batch", type=int, metavar="N", help="batch size (default: the model's own)")
    add("--quick", action="store_true", help="two examples a batch: does it run at all?")
    add("--out", type=Path, default=Path("replfx-benchmarks", "step"), metavar="DIR")
    add("--repeats", type=int, metavar="N", help="timed rounds (default: 10; quick: 3)")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches a step; one row more from 2 on")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write JSON, Markdown and a plot."""
    device = device_of(args)
    repeats = args.repeats or (3 if args.quick else 10)
    console = Console()
    rows: list[Row] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(args.models) * (WARMUP + repeats))
        for name in args.models:
            progress.update(task, description=name)
            trainings, refused = _trainings(args, name, device)
            costs = training_costs(trainings, repeats, warmup=WARMUP, on_round=lambda: progress.advance(task))
            rows += _compared(name, costs, refused)
    config = {
        "device": device.type,
        "bf16": args.bf16,
        "every": args.every,
        "repeats": repeats,
        "accumulate": args.accumulate,
        "batch": {name: _batch_size(args, name, device) for name in args.models},
    }
    for table in tables(rows):
        console.print(table)
    for path in write(rows, config, environment(device), args.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _trainings(args: argparse.Namespace, name: str, device: torch.device) -> tuple[dict[str, Training], dict[str, str]]:
    """Set every variant up; a variant that the model's blocks do not have goes to the second dict."""
    trainings: dict[str, Training] = {}
    refused: dict[str, str] = {}
    batch = _batch_size(args, name, device)
    made = {"every": args.every, "batch": batch, "device": device, "bf16": args.bf16}
    for variant in (*VARIANTS, ONCE) if args.accumulate > 1 else VARIANTS:
        try:
            trainings[variant.name] = _training_of(name, variant, **made, micro_batches=args.accumulate)
        except ReplfxError as error:
            if variant in (FULL, REMOVED):
                raise
            refused[variant.name] = first_reason(error)
    return trainings, refused


def _batch_size(args: argparse.Namespace, name: str, device: torch.device) -> int:
    """Choose the batch size of a model: asked for, tiny when quick, else the model's own."""
    return args.batch or (2 if args.quick else SUBJECTS[name].sizes[device.type])


def _training_of(
    name: str,
    variant: Variant,
    *,
    every: int,
    batch: int,
    device: torch.device,
    bf16: bool,
    micro_batches: int = 1,
) -> Training:
    """Build a model from seed 0, replace its blocks and put it into training with AdamW.

    Args:
        name: of the model.
        variant: what is done to it.
        every: k, of which blocks.
        batch: examples a micro-batch.
        device: where.
        bf16: run forward under bfloat16 autocast.
        micro_batches: how many a step has.

    Raises:
        ReplfxError: the model's blocks do not have the variant's operator.

    """
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    model: nn.Module = subject.build(device.type).train().to(device)
    inputs, targets = (t.to(device) for t in subject.batch(device.type, batch))
    if variant.operator is not None:
        model = replfx.transform(model, inputs[:2], every=every, fusion=variant.fusion, operator=variant.operator)
    made = in_training(model, model, inputs, targets, bf16=bf16)
    return replace(made, micro_batches=micro_batches, once=variant.once)


def _compared(model: str, costs: dict[str, StepCost], refused: dict[str, str]) -> list[Row]:
    """Set each cost beside the two bounds."""
    ratios = pairwise_ratios({name: cost.step_seconds for name, cost in costs.items()}, FULL.name)
    full, removed = costs[FULL.name], costs[REMOVED.name]
    rows = [
        Row(
            model,
            name,
            cost,
            ratios[name],
            eta_time=saving_kept(1.0, ratios[name].median, ratios[REMOVED.name].median),
            eta_peak=saving_kept(full.peak_bytes, cost.peak_bytes, removed.peak_bytes),
            eta_saved=saving_kept(full.saved_bytes, cost.saved_bytes, removed.saved_bytes),
            peak_ratio=cost.peak_bytes / full.peak_bytes,
            saved_ratio=cost.saved_bytes / full.saved_bytes,
        )
        for name, cost in costs.items()
    ]
    return rows + [Row(model, name, reason=reason) for name, reason in refused.items()]
