"""What should be run where there is a GPU for ten minutes: the flagship at a scale, steps, kernels and tests."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import store
from benchmarks.accuracy.training import Speed
from benchmarks.common import add_device_argument, commit, device_of
from benchmarks.compiling.subjects import SUBJECTS, Way
from benchmarks.gpu import data
from benchmarks.gpu.jobs import CONTEXT, LANGUAGE, QUICK, SMALL_IMAGES, STEP_WAYS, VARIANTS, Learning, Stepping
from benchmarks.gpu.report import write
from benchmarks.gpu.workers import Job, Record, Team, merged
from replfx import ReplfxError
from replfx.measure import environment

SECONDS = {"language": 190, "images": 90, "steps": 110, "kernels": 30, "tests": 60}
"""The parts in their order, and how long each may take: eight minutes."""

QUICK_SECONDS = {"language": 60, "images": 35, "steps": 30, "kernels": 60, "tests": 35}
"""The same for a quick run on two cores of a CPU: with what it takes to start, four minutes."""

STEP_MODELS = {"gpt2": 8, "vit_b": 64}
"""Examples a batch: six trainings of each are on the GPU at once."""

_END = 8.0  # seconds before a part's bound at which its processes stop, to leave what they have
_ROUNDS = 3  # in which steps are timed, one process after the other
_SHARE = 0.8  # of the time that is left, filled with steps: evaluations, and compiling once more where a model grows
_QUICK_STEPS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add_device_argument(parser)
    add("--quick", action="store_true", help="small models, few steps: does it run at all?")
    add("--parts", type=lambda t: t.split(","), default=list(SECONDS), help=f"of {', '.join(SECONDS)} (all)")
    add("--minutes", type=float, help="for all parts together (8; quick: 4)")
    add("--images", type=Path, default=Path("replfx-benchmarks", "cifar10.npz"), help="as --pack-cifar wrote it")
    add("--pack-cifar", type=Path, metavar="DIR", help="only write --images, from the CIFAR-10 in DIR")
    add("--work", type=Path, default=Path(tempfile.gettempdir(), "replfx-gpu"), help="for data and checkpoints")
    add("--out", type=Path, default=Path("replfx-benchmarks", "gpu"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Go through the parts, and write the report after each, so that a run that is cut leaves one."""
    console = Console()
    if args.pack_cifar is not None:
        size = data.pack(args.pack_cifar, args.images)
        console.print(f"wrote {args.images}: {size / 1e6:.1f} MB")
        return 0
    if unknown := [part for part in args.parts if part not in SECONDS]:
        raise ReplfxError(f"there is no part {unknown[0]}; there are {', '.join(SECONDS)}")
    device = device_of(args)
    session = Session(args, device, console)
    stamps = {**environment(device), "commit": commit(), "date": time.strftime("%Y-%m-%d"), "quick": args.quick}
    session.keep({"name": "session", "kind": "session", **stamps})
    parts: dict[str, Callable[[float], None]] = {
        "language": partial(session.learn, "language", (LANGUAGE,)),
        "images": partial(session.learn, "images", SMALL_IMAGES[: 1 if args.quick else None]),
        "steps": session.steps,
        "kernels": session.kernels,
        "tests": session.tests,
    }
    seconds = QUICK_SECONDS if args.quick else SECONDS
    for part in args.parts:
        bound = seconds[part] * (1.0 if args.minutes is None else 60 * args.minutes / sum(seconds.values()))
        start = time.time()
        try:
            parts[part](start + bound)
        except ReplfxError as error:
            session.keep({"name": f"{part}/left out", "kind": "left out", "part": part, "reason": str(error)})
        console.print(f"{part}: {time.time() - start:.0f} s of {bound:.0f} s", highlight=False)
        written = write(list(session.records().values()), args.out)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return int(session.failures > 0)


@dataclass
class Session:
    """What is measured in one sitting, or in several that go on where the last one was cut."""

    args: argparse.Namespace
    device: torch.device
    console: Console
    failures: int = field(default=0)

    @property
    def lines(self) -> Path:
        """The file of records."""
        return Path(self.args.out) / "gpu.jsonl"

    def records(self) -> dict[str, Record]:
        """All records so far."""
        return store.read(self.lines)

    def keep(self, record: Record) -> None:
        """Add a record."""
        store.append(self.lines, record)

    # ---- training

    def learn(self, part: str, tasks: Sequence[str], deadline: float) -> None:
        """Train all variants of these tasks side by side."""
        known = self.records()
        planned = known.get(f"{part}/plan", {})
        jobs = [
            Learning(
                task,
                variant,
                self._stored(task),
                str(self.device),
                self.args.quick,
                self._speed(task),
                Path(self.args.work) / "checkpoints",
                planned.get("steps"),
            )
            for task in tasks
            for variant in self._variants(task)
            if known.get(f"{task}/{variant}", {}).get("status") != "done"
        ]
        with Team(jobs, self._threads(jobs)) as team:
            compiled = self._gather(team, deadline, "ready")
            if not planned and team.names:
                alone = {name: self._timed(team, name, deadline) for name in team.names}
                alone = {name: figures for name, figures in alone.items() if figures}
                steps = self._steps_within(deadline, [f["seconds"]["median"] for f in alone.values()])
                planned = {"steps": steps, "compiled": compiled, "alone": alone}
                self.keep({"name": f"{part}/plan", "kind": "plan", "part": part, **planned})
            for name in team.names:
                team.ask(name, "go", planned["steps"], deadline - _END)
            for name, status, content in team.answers(team.names, deadline):
                if status != "failed":
                    self.keep({"name": name, "kind": "run", "part": part, "status": status, **content})
            self._note_failures(team, part)

    def _variants(self, task: str) -> list[str]:
        return [VARIANTS[task][i] for i in QUICK[task]] if self.args.quick else list(VARIANTS[task])

    def _stored(self, task: str) -> Path:
        """The data of a task as all processes read it, made by the first that asks."""
        quick = "-quick" if self.args.quick else ""
        kind = LANGUAGE if task == LANGUAGE else "cifar10"
        path = Path(self.args.work) / f"{kind}{quick}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == LANGUAGE:
                read: Any = data.sources(CONTEXT[self.args.quick], 2_000_000 if self.args.quick else data.MOST)
            else:
                read = data.unpacked(self.args.images)
            beside = path.with_suffix(".part")
            torch.save(vars(read), beside)
            beside.replace(path)
        return path

    def _speed(self, task: str) -> Speed:
        """Small ResNets are so small that compiling them would take longer than training them."""
        compiler = None if task != LANGUAGE else "eager" if self.args.quick else "inductor"
        return Speed(bf16=self.device.type == "cuda", compiler=compiler)

    def _threads(self, jobs: Sequence[Job]) -> int:
        return max(1, torch.get_num_threads() // max(1, len(jobs)))

    def _steps_within(self, deadline: float, seconds: Sequence[float]) -> int:
        """As many as all processes together take in the time that is left, each alone as long as it was timed."""
        if self.args.quick:
            return _QUICK_STEPS
        left = max(0.0, deadline - _END - time.time())
        return max(50, int(_SHARE * left / max(sum(seconds), 1e-6)))

    def _gather(self, team: Team, deadline: float, wanted: str) -> dict[str, Any]:
        return {name: found for name, kind, found in team.answers(team.names, deadline) if kind == wanted}

    def _timed(self, team: Team, name: str, deadline: float) -> Record:
        """One process's figures, all others waiting."""
        team.ask(name, "time")
        return next((found for _, kind, found in team.answers([name], deadline) if kind == "timed"), {})

    def _note_failures(self, team: Team, part: str) -> None:
        for name, why in team.failed.items():
            self.failures += 1
            self.console.print(f"{name} failed: {why}", highlight=False, markup=False)
            last = why.strip().splitlines()[-1]
            self.keep({"name": f"{name}/failed", "kind": "failed", "part": part, "of": name, "reason": last})

    # ---- the other parts

    def steps(self, deadline: float) -> None:
        """Time a step of each model in every way: compiled side by side, timed in turn."""
        models = list(STEP_MODELS)[: 1 if self.args.quick else None]
        for index, model in enumerate(models):
            if any(r["kind"] == "step" and r["model"] == model for r in self.records().values()):
                continue
            until = time.time() + (deadline - time.time()) / (len(models) - index)
            batch = STEP_MODELS[model] if self.device.type == "cuda" else SUBJECTS[model].sizes["cpu"]
            batch = 2 if self.args.quick else batch
            jobs = [Stepping(model, way, str(self.device), self.args.quick, batch) for way in self._ways()]
            with Team(jobs, self._threads(jobs)) as team:
                compiled = self._gather(team, until, "ready")
                taken: dict[str, list[Record]] = {name: [] for name in team.names}
                for _ in range(_ROUNDS):
                    for name in team.names:
                        taken[name] += [found] if (found := self._timed(team, name, until)) else []
                for name, figures in taken.items():
                    if figures:
                        rest = {"model": model, "batch": batch, "compiled": compiled[name], **merged(figures)}
                        self.keep({"name": f"step/{name}", "kind": "step", "part": "steps", **rest})
                self._note_failures(team, "steps")

    def _ways(self) -> list[Way]:
        """All; of a quick run two, traced and not compiled."""
        return [replace(way, compiler="eager") for way in STEP_WAYS[:3:2]] if self.args.quick else list(STEP_WAYS)

    def kernels(self, deadline: float) -> None:
        """The fusion kernels alone."""
        options = ["--models", "", "--device", self.device.type, "--out", str(self.args.out / "kernels")]
        self._command("kernels", ["-m", "benchmarks", "compile", *options, *["--quick"] * self.args.quick], deadline)

    def tests(self, deadline: float) -> None:
        """The tests that need a GPU; each file with one is named, since collecting all others takes longer."""
        files = [str(file) for file in sorted(Path("tests").rglob("*.py")) if "mark.gpu" in file.read_text()]
        folders = {file if Path(file).name.startswith("test_") else str(Path(file).parent) for file in files}
        named = sorted(folders - {str(Path("tests"))})
        self._command("tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *named], deadline)

    def _command(self, part: str, arguments: Sequence[str], deadline: float) -> None:
        """Run a command of its own up to the deadline; its output is kept."""
        if self.records().get(part, {}).get("status") == "done":
            return
        out = Path(self.args.out) / f"{part}.txt"
        with out.open("w") as file:
            try:
                left = max(1.0, deadline - time.time())
                command = [sys.executable, *arguments]
                ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False)
                said = "done" if ended.returncode == 0 else f"exit status {ended.returncode}"
            except subprocess.TimeoutExpired:
                said = "cut"
        self.failures += said.startswith("exit")
        lines = [line for line in out.read_text().splitlines() if line.strip()]
        self.keep({"name": part, "kind": "command", "part": part, "status": said, "last": lines[-1] if lines else ""})
