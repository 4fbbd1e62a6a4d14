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

from benchmarks.common import commit
from benchmarks.scale.output import Growth, ModelRow, Results, tables, write
from benchmarks.scale.subjects import BATCH, MODELS, TOWERS, Model, Tower
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
        help=f"which models and towers, of {', '.join(names)} (all); rows of others that DIR has stay",
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
    results = Results(
        config={"repeats": repeats, "quick": args.quick, "batch": BATCH},
        environment=environment(torch.device("cpu")) | {"threads": 1},  # that of the processes that measure
    )
    results.read(args.out)
    console = Console()
    with Progress(console=console) as progress:
        rows = _rows(args, repeats, heights)
        for row in progress.track(rows, _count(args.only), description="models and towers"):
            results.add(row)
            paths = write(results, args.out)  # after each: a run that is cut short leaves what it has measured
    for table in tables(results):
        console.print(table)
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _count(names: list[str]) -> int:
    subjects: dict[str, Model | Tower] = {**MODELS, **TOWERS}
    return sum(1 + subjects[name].symbolic for name in names)


def _rows(args: argparse.Namespace, repeats: int, heights: tuple[int, ...]) -> Iterator[ModelRow | Growth]:
    yield from _models(args, repeats)
    yield from _growths(args, repeats, heights)


def _models(args: argparse.Namespace, repeats: int) -> Iterator[ModelRow]:
    for name in (name for name in args.only if name in MODELS):
        for inputs in (True, False) if MODELS[name].symbolic else (True,):
            job = Job(name, inputs, repeats, small=args.quick)
            yield ModelRow(name, inputs, _alone(time_model, job), _alone(memory_of, job), commit())


def _growths(args: argparse.Namespace, repeats: int, heights: tuple[int, ...]) -> Iterator[Growth]:
    for name in (name for name in args.only if name in TOWERS):
        for inputs in (True, False) if TOWERS[name].symbolic else (True,):
            jobs = [Job(name, inputs, repeats if blocks <= FEW else 1, blocks) for blocks in heights]
            timings = {blocks: _alone(time_tower, job) for blocks, job in zip(heights, jobs, strict=True)}
            yield Growth(name, inputs, timings, commit())


def _alone(measure: Callable[[Job], T], job: Job) -> T:
    """Measure in a fresh process: no other measurement's memory, caches or garbage are in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scale.trial"])  # the imports are done once
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(measure, job).result()
        except BrokenProcessPool as error:
            raise ReplfxError(f"{job}: its process died; was there too little memory?") from error
