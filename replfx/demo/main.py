"""The demo from options to results: which variants, in which order, and what is kept of each."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from replfx.demo import results
from replfx.demo.results import Row
from replfx.demo.text import load
from replfx.demo.train import BATCH, DEPTH, VARIANTS, WIDTH, Run, train, training_of
from replfx.errors import ReplfxError
from replfx.measure import environment, training_costs

WARMUP, ROUNDS = 3, 20
"""Untimed rounds before the step times are taken, and timed ones."""


def run(args: argparse.Namespace) -> int:
    """Train every variant over the seeds, measure what a step costs, and write it all down."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ReplfxError("--device cuda: PyTorch finds no CUDA device here")
    torch.set_num_threads(args.threads)
    text = load(args.text)
    seeds, steps, rounds = (1, 24, 3) if args.quick else (args.seeds, args.steps, ROUNDS)
    console = Console(stderr=args.json)
    runs: dict[str, list[Run]] = {variant.name: [] for variant in VARIANTS}
    with _progress(console) as progress:
        task = progress.add_task("", total=seeds * sum(v.steps_of(steps) for v in VARIANTS) + rounds + WARMUP)
        progress.update(task, description="costs of a step")
        costs = training_costs(
            {variant.name: training_of(variant, text, device) for variant in VARIANTS},
            rounds,
            warmup=WARMUP,
            on_round=lambda: progress.advance(task),
        )
        for seed in range(seeds):
            for variant in VARIANTS:
                progress.update(task, description=f"{variant.name}, seed {seed}")
                runs[variant.name].append(train(variant, text, seed, steps, device, lambda: progress.advance(task)))
    rows = [Row(variant, costs[variant.name], tuple(runs[variant.name])) for variant in VARIANTS]
    config = {
        "text": text.name,
        "bytes": len(text.train),
        "model": f"{DEPTH} causal transformer blocks of width {WIDTH}",
        "batch": BATCH,
        "steps": steps,
        "seeds": seeds,
        "variants": [asdict(variant) for variant in VARIANTS],
    }
    record = results.record(rows, config, environment(device))
    if args.json:
        print(json.dumps(record, indent=2))
    else:
        console.print(results.table(rows, text.name, steps))
    for path in results.write(rows, record, text.name, args.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
