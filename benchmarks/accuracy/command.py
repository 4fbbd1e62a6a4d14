"""What does replacing blocks cost in accuracy, and what does it save in time, on real data?"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import store
from benchmarks.accuracy import costs
from benchmarks.accuracy.output import table, write
from benchmarks.accuracy.report import rows_of
from benchmarks.accuracy.tasks import BUDGETS, TASKS, Subject, subject_of
from benchmarks.accuracy.training import Run
from benchmarks.accuracy.variants import Variant, variant_of
from benchmarks.common import add_device_argument, commit, device_of
from replfx import ReplfxError
from replfx.measure import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--task", choices=list(TASKS), required=True, help="what is learned, and by which model")
    add("--budget", choices=BUDGETS, default="small", help="minutes on a CPU, or the full recipe for a GPU (small)")
    add("--variants", nargs="+", metavar="VARIANT", help="as in benchmarks/accuracy/variants.py (the task's own)")
    add("--seeds", type=_seeds, default=[0, 1, 2], metavar="S,…", help="seeds to train from (0,1,2)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipe; may be repeated")
    add("--data-root", type=Path, metavar="DIR", help="the folder that holds the data sets")
    add_device_argument(parser)
    add("--runs", type=int, metavar="N", help="train at most N runs to their end")
    add("--max-minutes", type=float, default=math.inf, metavar="M", help="stop then, in the middle of a run too")
    add("--repeats", type=int, default=10, metavar="N", help="rounds in which costs are measured (10)")
    add("--report", action="store_true", help="only write the tables from what is there")
    add("--target", type=float, metavar="X", help="metric to reach in the column time to target (full's worst)")
    add("--out", type=Path, default=Path("replfx-benchmarks", "accuracy"), metavar="DIR")


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0,1,2") from None


def run(args: argparse.Namespace) -> int:
    """Train the runs of the grid that have no record yet, as many as asked for, and write the report."""
    console = Console()
    variants = _grid(args.variants or TASKS[args.task].variants)
    budget = ",".join([args.budget, *sorted(args.set)])
    lines = args.out / "accuracy.jsonl"
    if not args.report:
        if args.data_root is None:
            raise ReplfxError("the data is read from a folder: name it with --data-root")
        device = device_of(args)
        _be_deterministic(device)
        subject = subject_of(args.task, args.budget, args.set, args.data_root, device)
        _work(args, subject, variants, lines, device, console)
    records = [r for r in store.read(lines).values() if r["subject"] == f"{args.task}/{budget}"]
    shown = [v.name for v in variants]
    if not args.variants:
        shown = list(dict.fromkeys(shown + [r["variant"] for r in records]))
    rows = [r for r in rows_of(records, shown, TASKS[args.task].metric, args.target) if r.metrics or args.variants]
    if not any(row.metrics for row in rows):
        raise ReplfxError(f"{lines} has no finished run of {args.task}/{budget}")
    console.print(table(rows, TASKS[args.task].metric))
    for path in write(rows, records, f"{args.task}/{budget}", TASKS[args.task].metric, args.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _be_deterministic(device: torch.device) -> None:
    """Have CUDA's libraries take the same way each time; on the CPU PyTorch does so anyway."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def _grid(names: Sequence[str]) -> list[Variant]:
    """The variants asked for, with full first and what the others refer to."""
    wanted = dict.fromkeys(["full", *names])
    for variant in map(variant_of, names):
        if variant.as_long_as is not None:
            wanted.update(dict.fromkeys([variant.as_long_as, variant.made_as]))
    return [variant_of(name) for name in wanted]


def _work(
    args: argparse.Namespace,
    subject: Subject,
    variants: Sequence[Variant],
    lines: Path,
    device: torch.device,
    console: Console,
) -> None:
    """Measure the costs that are missing, then train; seeds in the outer loop, so that pairs are complete early."""
    deadline = time.monotonic() + 60 * args.max_minutes
    stamps = {**environment(device), "commit": commit()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        known = _costs(args, subject, variants, lines, device, stamps, progress)
        finished = 0
        for seed in args.seeds:
            for variant in variants:
                if "reason" in known[variant.name] or f"{subject.name}/{variant.name}/{seed}" in store.read(lines):
                    continue
                if finished == args.runs or time.monotonic() > deadline:
                    return
                steps = _steps(subject, variant, known)
                training = Run(subject, variant, seed, device, args.out / "checkpoints", steps)
                if not _train(training, deadline, progress):
                    return
                store.append(lines, training.record(known[variant.name], stamps))
                training.forget()
                finished += 1


def _costs(
    args: argparse.Namespace,
    subject: Subject,
    variants: Sequence[Variant],
    lines: Path,
    device: torch.device,
    stamps: dict[str, Any],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """What a step of each variant costs, by name; measured where there is no record yet."""
    records = store.read(lines)
    # Full is measured with all others, so that each ratio is of one time.
    missing = [v for v in variants if costs.name_of(subject, v.name) not in records]
    if missing:
        full = [variant_of(costs.FULL)] if costs.FULL not in (v.name for v in missing) else []
        task = progress.add_task(f"{subject.name}: costs", total=args.repeats + costs.WARMUP)
        found = costs.measure(subject, full + missing, device, args.repeats, stamps, lambda: progress.advance(task))
        for record in found:
            if record["name"] not in records:
                store.append(lines, record)
        records = store.read(lines)
    return {v.name: records[costs.name_of(subject, v.name)] for v in variants}


def _steps(subject: Subject, variant: Variant, known: dict[str, dict[str, Any]]) -> int | None:
    """How many steps fill the time that another variant takes; None leaves the recipe's."""
    if variant.as_long_as is None:
        return None

    def share(name: str) -> float:
        return variant_of(name).share_of_full(known[name]["step_over_full"]["median"])

    return max(1, round(subject.recipe.steps * share(variant.as_long_as) / share(variant.made_as)))


def _train(training: Run, deadline: float, progress: Progress) -> bool:
    task = progress.add_task(training.name, total=training.recipe.steps, completed=training.progress.step)

    def stop(step: int) -> bool:
        progress.update(task, completed=step)
        return time.monotonic() > deadline

    return training.train(stop)
