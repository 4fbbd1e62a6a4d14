"""Which models of timm, torchvision and transformers can be transformed, and why not the others?"""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import threading
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import store
from benchmarks.common import commit
from benchmarks.zoo.output import totals_table, write
from benchmarks.zoo.worker import Job, Limits
from replfx import ReplfxError

SOURCES = ("timm", "torchvision", "transformers")
MORE = ("others",)  # of libraries that `pip install replfx[zoo-others]` brings
STATUSES = ("replaced", "refused", "failure")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    limits = Limits()
    add = parser.add_argument
    known = ", ".join((*SOURCES, *MORE))
    add("--source", type=_sources, default=list(SOURCES), metavar="NAME,…", help=f"of {known} (the first three)")
    add("--only", action="append", metavar="GLOB", help="only models like this, as in timm:vit_*; may be repeated")
    add("--rerun", action="append", choices=STATUSES, default=[], help="try those again that came out so")
    add("--operator", default="block", metavar="NAME", help="our operator (%(default)s); --out of its own")
    add("--no-peers", action="store_true", help="leave the other tools out")
    add("--workers", type=int, default=1, metavar="N", help="models at a time, each with one thread (1)")
    add("--timeout", type=float, default=limits.check_seconds, metavar="S", help="seconds a model (%(default)g)")
    add("--peer-parameters", type=float, default=limits.peer_parameters, metavar="N", help="give peers models up to N")
    add("--peer-timeout", type=float, default=limits.peer_seconds, metavar="S", help="and a peer (%(default)g)")
    add("--memory", type=float, default=limits.memory / 2**30, metavar="GIB", help="memory a model (%(default)g)")
    add("--report", action="store_true", help="only write the tables from what is there")
    add("--out", type=Path, default=Path("replfx-benchmarks", "zoo"), metavar="DIR")


def _sources(text: str) -> list[str]:
    given, known = text.split(","), (*SOURCES, *MORE)
    if unknown := [name for name in given if name not in known]:
        raise argparse.ArgumentTypeError(f"no source {', '.join(unknown)}; there are {', '.join(known)}")
    return given


def run(args: argparse.Namespace) -> int:
    """Try the models that have no record yet, and write all records and the tables."""
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = args.out / "zoo.jsonl"
    if not args.report:
        names = _names(args, console)
        known = store.read(lines)
        missing = [n for n in names if n not in known or known[n]["status"] in args.rerun]
        console.print(f"{len(names)} models, {len(names) - len(missing)} of them done before", highlight=False)
        if missing:
            _try(missing, args, lines, console)
    records = list(store.read(lines).values())
    if not records:
        raise ReplfxError(f"{lines} has no records")
    console.print(totals_table(records))
    for path in write(records, _config(args), args.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def module_of(source: str) -> ModuleType:
    """The module that knows a source's models; loaded when asked for, as it imports the library."""
    return importlib.import_module(f"benchmarks.zoo.{source}_models")


def _names(args: argparse.Namespace, console: Console) -> list[str]:
    names: list[str] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("counting parameters", visible=False)

        def on_count(done: int, total: int) -> None:
            progress.update(task, visible=True, completed=done, total=total)

        for source in args.source:
            names += module_of(source).names(args.out / f"{source}-parameters.json", on_count)
    return [n for n in names if not args.only or any(fnmatch(n, glob) for glob in args.only)]


def _try(names: Sequence[str], args: argparse.Namespace, lines: Path, console: Console) -> None:
    from benchmarks.zoo.peers import PEERS
    from benchmarks.zoo.runner import run_all

    limits = Limits(args.timeout, args.peer_timeout, int(args.memory * 2**30), args.peer_parameters)
    peers = [] if args.no_peers else list(PEERS)
    jobs = [Job(module_of(name.partition(":")[0]).__name__, name, peers, limits, args.operator) for name in names]
    stamps, lock = versions(), threading.Lock()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))

        def on_record(record: Mapping[str, Any]) -> None:
            with lock:
                store.append(lines, {**record, "versions": stamps})
            if record["status"] == "failure":
                text = f"{record['name']}: failure in {record['stage']}: {record['error']}"
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)

        run_all(
            jobs, args.workers, args.out / "zoo.log", lambda job: progress.update(task, description=job.name), on_record
        )


def versions() -> dict[str, str]:
    """What a record depends on."""
    packages = ("torch", "timm", "torchvision", "transformers", "torch-pruning", "replfx")
    return {name: version(name) for name in packages} | {"commit": commit(), "python": platform.python_version()}


def _config(args: argparse.Namespace) -> dict[str, object]:
    return {
        "timeout": args.timeout,
        "peer_timeout": args.peer_timeout,
        "peer_parameters": args.peer_parameters if math.isfinite(args.peer_parameters) else None,
        "memory_gib": args.memory,
        "peers": not args.no_peers,
        "operator": args.operator,
    }
