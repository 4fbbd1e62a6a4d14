"""Draw the plots of results again from their JSON files, without measuring anything."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import output
from benchmarks.accuracy import output as accuracy
from benchmarks.accuracy.report import rows_of
from benchmarks.accuracy.tasks import Metric
from benchmarks.budget import output as budget
from benchmarks.compiling import output as compiling
from benchmarks.inference import output as inference
from benchmarks.scale import output as scale
from benchmarks.transfer import command as transfer
from benchmarks.transfer import output as transferred
from replfx import ReplfxError

Record = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what another command wrote")


def run(args: argparse.Namespace) -> int:
    """Write FILE.png beside each FILE.json."""
    for file in args.files:
        record = json.loads(file.read_text())
        draw = next((draw for fits, draw in KINDS if fits(file.stem, record)), None)
        if draw is None:
            raise ReplfxError(f"{file} is no result that has a plot")
        picture = file.with_name(f"{file.stem}.png")
        draw(record, picture)
        print(f"wrote {picture}")
    return 0


def _accuracy(record: Record, path: Path) -> None:
    metric = Metric(record["metric"], record["higher_is_better"])
    target = next((row["target"] for row in record["rows"] if row["target"] is not None), None)
    rows = rows_of(record["records"], [row["variant"] for row in record["rows"]], metric, target)
    accuracy.plot(rows, record["subject"], metric, path)


def _scale(record: Record, path: Path) -> None:
    models = [scale.ModelRow.from_dict(row) for row in record["models"]]
    scale.plot(models, [scale.Growth.from_dict(row) for row in record["growth"]], path)


def _transfer(record: Record, path: Path) -> None:
    found = {name: [transfer.Result(**raw) for raw in results] for name, results in record["results"].items()}
    transferred.plot(transfer.rows_of(found), path)


KINDS: tuple[tuple[Callable[[str, Record], bool], Callable[[Record, Path], None]], ...] = (
    (lambda stem, record: "subject" in record, _accuracy),
    (lambda stem, record: stem == "step", output.plot),
    (lambda stem, record: stem == "budget", budget.plot),
    (lambda stem, record: stem == "inference", inference.plot),
    (lambda stem, record: stem == "compile", compiling.plot),
    (lambda stem, record: stem == scale.NAME, _scale),
    (lambda stem, record: stem == "transfer", _transfer),
)
"""By which name or key a command's file is known, and what draws it."""
