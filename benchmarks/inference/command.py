"""What does a trained model cost to run: transformed, materialized, compiled and in INT8?"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.common import add_device_argument, commit, device_of, first_reason, model_names
from benchmarks.inference.output import Row, tables, write
from benchmarks.inference.subjects import FULL, Runnable, runnable, ways_of
from benchmarks.models import SUBJECTS
from replfx import ReplfxError
from replfx.measure import environment, interleaved_times, pairwise_ratios

WARMUP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    names = partial(model_names, known=SUBJECTS)
    add("--models", type=names, default=list(SUBJECTS), metavar="NAME,…", help=f"of {', '.join(SUBJECTS)} (all)")
    add("--operators", type=_words, default=["block", "mixer", "light"], metavar="NAME,…", help="of the blocks (all)")
    add_device_argument(parser)
    add("--bf16", action="store_true", help="weights and images in bfloat16")
    add("--every", type=int, default=2, metavar="K", help="replace every K-th block")
    add("--batches", type=_sizes, metavar="N,…", help="batch sizes (1,64; quick: 1,2)")
    add("--repeats", type=int, metavar="N", help="timed rounds (20; quick: 3)")
    add("--quick", action="store_true", help="small batches, few rounds: does it run at all?")
    add("--out", type=Path, default=Path("replfx-benchmarks", "inference"), metavar="DIR")


def _words(text: str) -> list[str]:
    return text.split(",")


def _sizes(text: str) -> list[int]:
    sizes = [int(word) for word in text.split(",") if word.isdecimal()]
    if len(sizes) != len(text.split(",")) or 0 in sizes:
        raise argparse.ArgumentTypeError(f"{text!r} is no batch size, nor several with commas between them")
    return sizes


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and write files after each model, so that a run that is cut leaves some."""
    device, console = device_of(args), Console()
    batches = args.batches or ([1, 2] if args.quick else [1, 64])
    repeats = args.repeats or (3 if args.quick else 20)
    config = {
        "device": device.type,
        "bf16": args.bf16,
        "every": args.every,
        "batches": batches,
        "repeats": repeats,
        "quick": args.quick,
    }
    stamps = {**environment(device), "commit": commit()}
    rows: list[Row] = []
    written: list[Path] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(args.models) * len(batches) * (WARMUP + repeats))
        for name in args.models:
            progress.update(task, description=name)
            rows += _measured(name, args, device, batches, repeats, lambda: progress.advance(task))
            gc.collect()
            written = write(rows, config, stamps, args.out)
    for table in tables(rows):
        console.print(table)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _measured(
    name: str,
    args: argparse.Namespace,
    device: torch.device,
    batches: list[int],
    repeats: int,
    on_round: Callable[[], object],
) -> list[Row]:
    """Time all ways of running a model in turn, at each batch size."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    models: dict[str, Runnable] = {}
    reasons: dict[str, str] = {}
    for way in ways_of(args.operators):
        try:
            models[way.name] = runnable(SUBJECTS[name], way, device, every=args.every, dtype=dtype)
        except ReplfxError as error:
            if way == FULL:
                raise
            reasons[way.name] = first_reason(error)
    rows: list[Row] = []
    for batch in batches:
        inputs = SUBJECTS[name].batch(device.type, batch)[0].to(device)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        calls = {way: partial(model.call, inputs) for way, model in models.items()}
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # Inductor's advice on what to compile for
            times = interleaved_times(calls, repeats, warmup=WARMUP, on_round=on_round)
        ratios = pairwise_ratios(times, FULL.name)
        rows += [Row(name, way, batch, models[way].weight_bytes, times[way], ratios[way]) for way in models]
        rows += [Row(name, way, batch, reason=reason) for way, reason in reasons.items()]
    return rows
