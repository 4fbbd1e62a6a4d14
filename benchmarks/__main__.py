"""Dispatch ``python -m benchmarks COMMAND`` to the command's own file."""

from __future__ import annotations

import argparse
import sys

from benchmarks import redraw, step
from benchmarks.accuracy import command as accuracy
from benchmarks.budget import command as budget
from benchmarks.compiling import command as compiling
from benchmarks.gpu import command as gpu
from benchmarks.inference import command as inference
from benchmarks.scale import command as scale
from benchmarks.transfer import command as transfer
from benchmarks.zoo import command as zoo
from replfx import ReplfxError

COMMANDS = {
    "step": step,
    "compile": compiling,
    "inference": inference,
    "scale": scale,
    "accuracy": accuracy,
    "transfer": transfer,
    "zoo": zoo,
    "redraw": redraw,
    "budget": budget,
    "gpu": gpu,
}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    try:
        status: int = COMMANDS[args.command].run(args)
    except ReplfxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
