"""What is a replaced block of a pretrained model worth? Fine-tuning on the other half of CIFAR-10's classes.

A ResNet-20 is trained on five classes; then blocks are replaced, and it is fine-tuned, with a new head, on the other
five.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import replfx
from benchmarks.accuracy.images import Images, cifar10
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.report import Difference
from benchmarks.accuracy.resnet import ResNet
from benchmarks.accuracy.variants import chosen_blocks, removed
from benchmarks.common import add_device_argument, device_of
from benchmarks.drawing import markdown, write_files
from benchmarks.transfer.linear_map import with_linear_maps
from benchmarks.transfer.output import HEADS, Row, plot, table
from replfx import ReplfxError
from replfx.measure import environment, trainable_parameters

CLASSES = 5
PRETRAIN = Recipe(1_000, 256, "sgd", 0.4, weight_decay=5e-4)
"""The rate of the accuracy benchmark's `cifar10-resnet20`."""
FINE_TUNE = Recipe(200, 256, "sgd", 0.1, weight_decay=5e-4)
CALIBRATION = 8
"""Batches of training images that the closed forms see."""

Make = Callable[[nn.Module, Images, int], nn.Module]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR", help="has cifar10/ (see accuracy)")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,…", help="default: 0,1,2")
    parser.add_argument("--pretrain-steps", type=int, default=PRETRAIN.steps, metavar="N")
    parser.add_argument("--steps", type=int, default=FINE_TUNE.steps, metavar="N", help="of fine-tuning")
    add_device_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("replfx-benchmarks/transfer"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Train, print the table, and write JSON, Markdown and a plot."""
    device, console = device_of(args), Console()
    seeds = _seeds(args.seeds)
    whole = cifar10(args.data_root).to(device)
    halves = [half(whole, first) for first in (0, CLASSES)]
    recipes = replace(PRETRAIN, steps=args.pretrain_steps), replace(FINE_TUNE, steps=args.steps)
    found: dict[str, list[Result]] = {name: [] for name in VARIANTS}
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(seeds) * (recipes[0].steps + len(VARIANTS) * recipes[1].steps))
        for seed in seeds:
            for name, result in of_seed(halves, recipes, seed, lambda: progress.advance(task)).items():
                found[name].append(result)
    rows = rows_of(found)
    console.print(table(rows))
    config = {"seeds": seeds, "pretrain": asdict(recipes[0]), "fine_tune": asdict(recipes[1])}
    write(rows, found, config, environment(device), args.out)
    console.print(f"wrote {args.out}", soft_wrap=True, highlight=False)
    return 0


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ReplfxError(f"--seeds {text}: give whole numbers with commas between them") from None


def half(images: Images, first: int) -> Images:
    """The images of five classes, labelled 0 to 4."""

    def part(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kept = (labels >= first) & (labels < first + CLASSES)
        return pixels[kept], labels[kept] - first

    train, test = part(images.train, images.train_labels), part(images.test, images.test_labels)
    return Images(*train, *test)


# ---- what is compared


def _transformed(operator: str, calibrated: bool) -> Make:
    def make(model: nn.Module, images: Images, seed: int) -> nn.Module:
        batches = calibration(images, seed)
        fusion = "scalar" if operator == "block" else "channel"
        return replfx.transform(
            model, batches[0][:2], operator=operator, fusion=fusion, calibrate=batches if calibrated else None
        )

    return make


def _without(model: nn.Module, images: Images, seed: int) -> nn.Module:
    twin = copy.deepcopy(model)
    return removed(twin, chosen_blocks(model, calibration(images, seed)[0][:2], {}))


def _linear(model: nn.Module, images: Images, seed: int) -> nn.Module:
    twin, batches = copy.deepcopy(model), calibration(images, seed)
    return with_linear_maps(twin.eval(), chosen_blocks(model, batches[0][:2], {}), batches)


VARIANTS: Mapping[str, Make] = {
    "full": lambda model, images, seed: copy.deepcopy(model),
    "removed": _without,
    "linear map": _linear,
    "block": _transformed("block", calibrated=False),
    "block, calibrated": _transformed("block", calibrated=True),
    "light": _transformed("light", calibrated=False),
    "light, calibrated": _transformed("light", calibrated=True),
}


def calibration(images: Images, seed: int) -> list[Tensor]:
    """Batches of the pretraining images; on the first two of one the model is captured."""
    return [images.batch(seed, step, 256)[0] for step in range(CALIBRATION)]


# ---- training


@dataclass(frozen=True)
class Result:
    """Of one variant and seed.

    Attributes:
        before: accuracy on the first five classes once blocks are replaced, in percent, before any training.
        after: accuracy on the other five after fine-tuning.
        parameters: trainable ones.
    """

    before: float
    after: float
    parameters: int


def of_seed(
    halves: Sequence[Images], recipes: tuple[Recipe, Recipe], seed: int, on_step: Callable[[], object]
) -> dict[str, Result]:
    """Pretrain once, and fine-tune each variant from there."""
    first, other = halves
    torch.manual_seed(seed)
    model = ResNet(20, 8, stride=2).to(first.train.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.fc = nn.Linear(model.fc.in_features, CLASSES, device=first.train.device)
    head = nn.Linear(model.fc.in_features, CLASSES, device=first.train.device)
    trained(model, first, recipes[0], seed, on_step)
    found = {}
    for name, make in VARIANTS.items():
        made = make(model, first, seed)
        before = first.metric(made.eval(), True)
        made.fc = copy.deepcopy(head)
        trained(made, other, recipes[1], seed, on_step)
        found[name] = Result(before, other.metric(made.eval(), True), trainable_parameters(made))
    return found


def trained(model: nn.Module, images: Images, recipe: Recipe, seed: int, on_step: Callable[[], object]) -> None:
    """Train in place; the seed fixes the batches."""
    optimizer = recipe.optimizer_for(model.train())
    schedule = recipe.schedule_for(optimizer)
    for step in range(recipe.steps):
        optimizer.zero_grad()
        images.loss(model, images.batch(seed, step, recipe.batch)).backward()
        optimizer.step()
        schedule.step()
        on_step()


# ---- what comes out


def rows_of(found: Mapping[str, Sequence[Result]]) -> list[Row]:
    """Means over the seeds, and differences to `full` and `removed` paired by seed."""
    after = {name: {seed: r.after for seed, r in enumerate(results)} for name, results in found.items()}
    return [
        Row(
            name,
            mean(r.before for r in results),
            _spread([r.after for r in results]),
            Difference.of(after[name], after["full"]) if name != "full" else None,
            Difference.of(after[name], after["removed"]) if name != "removed" else None,
            results[0].parameters,
        )
        for name, results in found.items()
    ]


def _spread(values: list[float]) -> tuple[float, float | None]:
    return mean(values), stdev(values) if len(values) > 1 else None


def write(
    rows: Sequence[Row],
    found: Mapping[str, Sequence[Result]],
    config: Mapping[str, object],
    machine: Mapping[str, object],
    out: Path,
) -> None:
    """Write `transfer.json`, `transfer.md` and `transfer.png`."""
    raw = {name: [vars(result) for result in results] for name, results in found.items()}
    content = {"environment": machine, "config": config, "results": raw}
    text = markdown(HEADS, [row.cells() for row in rows], words=1)
    write_files(out, "transfer", content, text, lambda path: plot(rows, path), indent=1)
