"""The demo: a small language model at full depth, beside what replfx makes of it.

It is what ``python -m replfx demo`` runs: on the sources of Python's own standard library, over several seeds.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from replfx.errors import ReplfxError

__all__ = ["add_arguments", "positive", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help="train on this file, or on all files of this folder (default: the sources of Python's standard library)",
    )
    parser.add_argument("--out", type=Path, default=Path("replfx-demo"), metavar="DIR", help="where the results go")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each variant (3)")
    parser.add_argument(
        "--steps", type=positive, default=2500, metavar="N", help="optimizer steps at full depth (2500)"
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: does it run at all?")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; the files are written too")


def positive(text: str) -> int:
    """Read an option that is a number of things."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def run(args: argparse.Namespace) -> int:
    """Run the demo with parsed options; returns the exit status."""
    if find_spec("matplotlib") is None:
        raise ReplfxError("the demo needs matplotlib: pip install 'replfx[demo]'")
    from replfx.demo import main

    return main.run(args)
