"""What does the pass itself cost: in training steps, in memory, and as models grow?"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.scale.output import Growth, ModelRow, tables, write
from benchmarks.scale.subjects import BATCH, MODELS, TOWERS
from benchmarks.scale.trial import Job, memory_of, time_model, time_tower
from replfx import ReplfxError
from replfx.measure import environment

HEIGHTS = tuple(64 << i for i in range(7))  # 64 … 4,096 blocks
FEW = 256  # blocks, up to which a tower is timed more than once
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    names = [*MODELS, *TOWERS]
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=names,
        metavar="NAME,…",
        help=f"which models and towers, of {', '.join(names)} (default: all)",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="timed rounds (default: 3; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="a few blocks each: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("replfx-benchmarks", "scale"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Measure, each figure in a process of its own; print the tables; write JSON, Markdown and a plot."""
    if unknown := [name for name in args.only if name not in {**MODELS, **TOWERS}]:
        raise ReplfxError(f"--only: no {', '.join(unknown)}; there are {', '.join((*MODELS, *TOWERS))}")
    repeats = args.repeats or (1 if args.quick else 3)
    heights = (4, 8, 16) if args.quick else HEIGHTS
    console = Console()
    with Progress(console=console) as progress:
        models = list(progress.track(_models(args, repeats), _count(args.only, MODELS), description="models"))
        growths = list(
            progress.track(_growths(args, repeats, heights), _count(args.only, TOWERS), description="growth")
        )
    for table in tables(models, growths):
        console.print(table)
    config = {
        "repeats": repeats,
        "quick": args.quick,
        "batch": BATCH,
        "models": {row.model: MODELS[row.model].about for row in models},
        "towers": {growth.tower: TOWERS[growth.tower].about for growth in growths},
    }
    described = environment(torch.device("cpu")) | {"threads": 1}  # that of the processes that measure
    for path in write(models, growths, config, described, args.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _count(names: list[str], subjects: object) -> int:
    assert isinstance(subjects, dict)
    return sum(1 + subjects[name].symbolic for name in names if name in subjects)


def _models(args: argparse.Namespace, repeats: int) -> Iterator[ModelRow]:
    for name in (name for name in args.only if name in MODELS):
        for inputs in (True, False) if MODELS[name].symbolic else (True,):
            job = Job(name, inputs, repeats, small=args.quick)
            yield ModelRow(name, inputs, _alone(time_model, job), _alone(memory_of, job))


def _growths(args: argparse.Namespace, repeats: int, heights: tuple[int, ...]) -> Iterator[Growth]:
    for name in (name for name in args.only if name in TOWERS):
        for inputs in (True, False) if TOWERS[name].symbolic else (True,):
            jobs = [Job(name, inputs, repeats if blocks <= FEW else 1, blocks) for blocks in heights]
            yield Growth(
                name, inputs, {blocks: _alone(time_tower, job) for blocks, job in zip(heights, jobs, strict=True)}
            )


def _alone(measure: Callable[[Job], T], job: Job) -> T:
    """Measure in a fresh process: no other measurement's memory, caches or garbage are in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scale.trial"])  # the imports are done once
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(measure, job).result()
        except BrokenProcessPool as error:
            raise ReplfxError(f"{job}: its process died; was there too little memory?") from error
