"""Does a plan that was chosen for a budget cost what it is expected to?"""

from __future__ import annotations

import argparse
import gc
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import replfx
from benchmarks.budget.output import Row, table, write
from benchmarks.budget.subjects import SUBJECTS
from benchmarks.common import add_device_argument, commit, device_of, model_names
from replfx import ReplfxError
from replfx.measure import (
    Training,
    clock_for,
    environment,
    interleaved_times,
    pairwise_ratios,
    peak_training_bytes,
    trainable_parameters,
    training_on,
)
from replfx.modules.copying import faithful_copy
from replfx.tracing import Inputs

BUDGETS = {"memory": 0.7, "time": 0.75, "parameters": 0.6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    names = ", ".join(SUBJECTS)
    add("--models", type=lambda text: model_names(text, SUBJECTS), default=list(SUBJECTS), help=f"of {names} (all)")
    for name, share in BUDGETS.items():
        add(f"--{name}", type=float, nargs="+", default=[share], metavar="SHARE", help=f"budgets of {name} ({share})")
    add_device_argument(parser)
    add("--repeats", type=int, default=9, metavar="N", help="timed rounds (%(default)s)")
    add("--quick", action="store_true", help="small models: does it run at all?")
    add("--out", type=Path, default=Path("replfx-benchmarks", "budget"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Choose, measure, print the table, and write files after each model."""
    device, console = device_of(args), Console()
    stamps = {**environment(device), "commit": commit(), "quick": args.quick}
    budgets = [{name: share} for name in BUDGETS for share in getattr(args, name)]
    rows: list[Row] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(args.models) * len(budgets))
        for name in args.models:
            for budget in budgets:
                progress.update(task, description=f"{name}, {budget}")
                rows.append(_met(name, budget, device, args))
                progress.advance(task)
            written = write(rows, stamps, args.out)
    console.print(table(rows))
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _met(name: str, budget: dict[str, float], device: torch.device, args: argparse.Namespace) -> Row:
    """One model and budget: what is expected, and what is measured."""
    torch.manual_seed(0)
    model, example = SUBJECTS[name](device.type, args.quick)
    model, inputs = model.train().to(device), Inputs.of(example, model.cpu())
    assert inputs is not None
    ((asked, share),) = budget.items()
    model, inputs = model.to(device), inputs.map(lambda t: t.to(device))
    given: Any = inputs.kwargs or inputs.args
    try:
        made = replfx.transform(model, given, budget=budget)
    except ReplfxError as error:
        return Row(name, asked, share, reason=str(error))
    report = replfx.report(made)
    assert report.expected is not None
    trainings = {"full": _training(faithful_copy(model), inputs), "planned": _training(made, inputs)}
    peaks = {name: peak_training_bytes(t.step, t.model, t.optimizer, t.device) for name, t in trainings.items()}
    times = interleaved_times({name: t.step for name, t in trainings.items()}, args.repeats, clock=clock_for(device))
    row = Row(
        name,
        asked,
        share,
        operators=sorted({block.operator for block in report.blocks if block.operator is not None}),
        replaced=report.replaced,
        blocks=len(report.blocks),
        expected=report.expected,
        parameters=(trainable_parameters(model), trainable_parameters(made)),
        peaks=(peaks["full"], peaks["planned"]),
        times=times["planned"],
        ratios=pairwise_ratios(times, "full")["planned"],
    )
    del trainings, made, model
    gc.collect()
    return row


def _training(model: nn.Module, inputs: Inputs) -> Training:
    return training_on(model, inputs, partial(torch.optim.AdamW, lr=1e-4, fused=True))
