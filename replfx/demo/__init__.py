"""The demo: train a ViT and a residual CNN whole, with replaced blocks, and with those blocks deleted.

It is what ``python -m replfx demo`` runs, on real images, over several seeds.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from replfx import ReplfxError

__all__ = ["add_arguments", "run"]

DATASETS = ("digits", "cifar10")
NEEDED = {"timm": "timm", "torchvision": "torchvision", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="digits",
        help="what to train on (digits come with scikit-learn)",
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder that holds cifar10/{train,test}/CLASS/*.png or cifar-10-batches-py",
    )
    parser.add_argument("--out", type=Path, default=Path("replfx-demo"), metavar="DIR", help="where the results go")
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs of each variant")
    parser.add_argument("--epochs", type=_positive, default=12, metavar="N", help="passes over the images")
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="CPU threads (default: 1 for the digits, whose images are too small to share; else PyTorch's)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, few images: does it run at all?")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def run(args: argparse.Namespace) -> int:
    """Run the demo with parsed options; returns the exit status."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ReplfxError(f"the demo needs {', '.join(missing)}: pip install 'replfx[demo]'")
    from replfx.demo import main

    return main.run(args)
