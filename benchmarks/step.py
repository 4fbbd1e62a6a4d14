"""What does a training step cost: full, removed, and with each operator and fusion?"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.common import (
    FULL,
    REMOVED,
    Variant,
    add_common_arguments,
    batch_size,
    device_of,
    first_reason,
    training_of,
)
from benchmarks.output import Row, tables, write
from replfx import ReplfxError
from replfx.measure import StepCost, Training, environment, pairwise_ratios, saving_kept, training_costs

OPERATORS = ("block", "mixer", "light")
FUSIONS = ("scalar", "scalar_layer", "channel")
VARIANTS = (FULL, REMOVED, *(Variant(f"{o} {f}", o, f) for o in OPERATORS for f in FUSIONS))
ONCE = Variant("block scalar, once", "block", "scalar", once=True)
WARMUP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_common_arguments(parser, "step")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed rounds (default: 10; quick: 3)")
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="micro-batches a step; one row more from 2 on"
    )


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
        "batch": {name: batch_size(args, name, device) for name in args.models},
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
    batch = batch_size(args, name, device)
    made = {"every": args.every, "batch": batch, "device": device, "bf16": args.bf16}
    for variant in (*VARIANTS, ONCE) if args.accumulate > 1 else VARIANTS:
        try:
            trainings[variant.name] = training_of(name, variant, **made, micro_batches=args.accumulate)
        except ReplfxError as error:
            if variant in (FULL, REMOVED):
                raise
            refused[variant.name] = first_reason(error)
    return trainings, refused


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
