"""The demo from options to results: which variants, in which order, and what is kept of each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from replfx import ReplfxError, transform
from replfx.demo import data, results
from replfx.demo.models import MODELS
from replfx.demo.results import Row
from replfx.demo.train import Recipe, train, training_of
from replfx.measure import Cost, environment, training_costs

VARIANTS: dict[str, str | None] = {
    "full": None,
    "replfx block": "block",
    "replfx light": "light",
    "removed": "identity",
}
"""Name → the operator of the replaced blocks; None leaves the model as it is."""

WARMUP = 3
"""Untimed rounds before the step times are taken."""


def run(args: argparse.Namespace) -> int:
    """Train every variant of every model over the seeds, measure their costs, and write it all down."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ReplfxError("--device cuda: PyTorch finds no CUDA device here")
    # One thread on the tiny images: sharing them out gains little, loses much beside any other load, and makes
    # the accuracies depend on how many cores there are.
    torch.set_num_threads(args.threads or (1 if args.dataset == "digits" else torch.get_num_threads()))
    images = data.load(args.dataset, args.data_root)
    seeds, epochs, repeats = (1, 1, 3) if args.quick else (args.seeds, args.epochs, 15)
    if args.quick:
        images = images.shortened(train=256, test=128)
    images = images.to(device)
    recipe = Recipe(epochs=epochs)

    console = Console()
    rows: list[Row] = []
    with _progress(console) as progress:
        rounds = len(MODELS) * (len(VARIANTS) * seeds * epochs + repeats + WARMUP)
        task = progress.add_task("", total=rounds)
        for name, make in MODELS.items():
            progress.update(task, description=f"{name}: costs of a step")
            costs = _costs(make, images, recipe, repeats, lambda: progress.advance(task))
            accuracies: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            for seed in range(seeds):
                for variant in VARIANTS:
                    progress.update(task, description=f"{name} {variant}, seed {seed}")
                    model = _variant(make, variant, images, seed)
                    right = train(model, images, recipe, seed, lambda: progress.advance(task))
                    accuracies[variant].append(right)
            rows += [Row(name, v, costs[v], tuple(accuracies[v])) for v in VARIANTS]

    config = {"dataset": images.name, "seeds": seeds, "quick": args.quick, **asdict(recipe)}
    console.print(results.table(rows, images.name, seeds))
    for path in results.write(rows, config, environment(device), args.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def _variant(make: Callable[[data.Images], nn.Module], variant: str, images: data.Images, seed: int) -> nn.Module:
    """Build the model from its seed, then replace blocks: what is kept starts alike in all variants."""
    torch.manual_seed(seed)
    model = make(images).to(images.train_images.device)
    operator = VARIANTS[variant]
    if operator is None:
        return model
    return transform(model, images.train_images[:2], operator=operator)


def _costs(
    make: Callable[[data.Images], nn.Module],
    images: data.Images,
    recipe: Recipe,
    repeats: int,
    on_round: Callable[[], object],
) -> dict[str, Cost]:
    """Measure a step of every variant, on models that are not trained further."""
    trainings = {v: training_of(_variant(make, v, images, seed=0), images, recipe) for v in VARIANTS}
    return training_costs(trainings, repeats, warmup=WARMUP, on_round=on_round)
