"""What one process measures: the cost of the pass on one model, or on one tower of one height.

Times are CPU seconds of the process, on one thread: what else runs on the machine does not count.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import replfx
from benchmarks.common import in_training
from benchmarks.scale.subjects import MODELS, TINY, TOWERS
from replfx.chains.find import find_chains
from replfx.chains.policy import Policy
from replfx.chains.select import select
from replfx.measure import Sample, Training, interleaved_times, unique_storage_bytes
from replfx.passes import run_passes
from replfx.plans import has_regions
from replfx.rewrite.build import build, insertion, install
from replfx.rewrite.verify import verify
from replfx.tracing import Inputs, capture_lazily

__all__ = ["PHASES", "Job", "Memory", "Timing", "memory_of", "time_model", "time_tower"]

PHASES = ("copy", "capture", "find chains", "select", "insert", "verify")
CLOCK = time.process_time
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One measurement, for a process of its own.

    Attributes:
        subject: name of a model, or of a tower.
        inputs: whether the pass is given example inputs.
        repeats: how often it is timed.
        blocks: of a tower.
        small: a few blocks of the model will do, for a quick check.
    """

    subject: str
    inputs: bool
    repeats: int = 1
    blocks: int | None = None
    small: bool = False


@dataclass(frozen=True)
class Timing:
    """What the pass takes.

    Attributes:
        capture: what captured the model: symbolic tracing or the recorder.
        replaced: how many blocks were replaced.
        transform: seconds of `replfx.transform` as a whole.
        phases: seconds of each of its phases, in runs of their own.
        step: seconds of a training step of the model; None of a tower.
    """

    capture: str
    replaced: int
    transform: Sample
    phases: dict[str, Sample]
    step: Sample | None

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        return {
            "capture": self.capture,
            "replaced": self.replaced,
            "transform_seconds": self.transform.to_dict(),
            "phase_seconds": {name: sample.to_dict() for name, sample in self.phases.items()},
            **({} if self.step is None else {"step_seconds": self.step.to_dict()}),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Timing:
        """Read what `to_dict` gave."""
        return cls(
            record["capture"],
            record["replaced"],
            Sample.from_dict(record["transform_seconds"]),
            {name: Sample.from_dict(sample) for name, sample in record["phase_seconds"].items()},
            Sample.from_dict(record["step_seconds"]) if "step_seconds" in record else None,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes: the model's parameters and buffers, what a copy of it makes resident, and the pass's peak beyond that."""

    model_bytes: int
    copy_bytes: int
    extra_bytes: int


def time_tower(job: Job) -> Timing:
    """Time the pass on a tower."""
    _prepare()
    build = TOWERS[job.subject].build
    example = torch.randn(2, TINY) if job.inputs else None
    replfx.transform(build(4, TINY), example)  # what is imported, and compiled, the first time
    assert job.blocks is not None
    return _timed(build(job.blocks, TINY), example, job.repeats, {})


def time_model(job: Job) -> Timing:
    """Time the pass on a model, in turn with training steps of it."""
    _prepare()
    training, inputs = _training(job)
    example = inputs if job.inputs else None
    replfx.transform(MODELS[job.subject].build(True), example)
    training.step()
    return _timed(training.model, example, job.repeats, {"step": training.step})


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _training(job: Job) -> tuple[Training, Tensor]:
    subject = MODELS[job.subject]
    model = subject.build(job.small).train()
    inputs, targets = subject.batch()
    return in_training(model, model, inputs, targets, bf16=False), inputs


def _timed(model: nn.Module, example: Tensor | None, repeats: int, steps: Mapping[str, Callable[[], object]]) -> Timing:
    phases, reports = _Phases(), []

    def whole() -> None:
        gc.enable()  # a user pays for what the collector does meanwhile
        reports.append(replfx.report(replfx.transform(model, example)))

    def apart() -> None:
        gc.enable()
        phases.run(model, example)

    runs = {**steps, "transform": whole, "phases": apart}
    times = interleaved_times(runs, repeats, warmup=0, on_round=gc.collect, clock=CLOCK)
    return Timing(
        capture=str(reports[0].capture),
        replaced=len(reports[0].replaced),
        transform=times["transform"],
        phases={name: Sample(tuple(phases.seconds[name])) for name in PHASES},
        step=times.get("step"),
    )


class _Phases:
    """Does what `replfx.transform` does, pass by pass, and notes what each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def run(self, model: nn.Module, example: Tensor | None) -> None:
        """Transform a copy of the model."""
        target = self._timed("copy", lambda: copy.deepcopy(model))
        graph = self._timed("capture", lambda: capture_lazily(target, example))
        found = self._timed("find chains", lambda: find_chains(graph))
        plan = self._timed("select", lambda: select(found, Policy(every=2))).plan
        if has_regions(plan):
            rewrite = self._timed("insert", lambda: run_passes(graph, [insertion(target, found, plan)]))
            target = rewrite.graph_module
        else:
            self._timed("insert", lambda: install(target, build(target, plan)))
        inputs = Inputs.of(example, model)
        self._timed("verify", lambda: verify(target, model, inputs, found.capture, plan))

    def _timed(self, name: str, phase: Callable[[], T]) -> T:
        start = CLOCK()
        result = phase()
        self.seconds[name].append(CLOCK() - start)
        return result


# ---- memory


def memory_of(job: Job) -> Memory:
    """Measure the peak of resident memory during `transform` over the model and a copy of it, as resident."""
    _prepare()
    subject = MODELS[job.subject]
    inputs, _ = subject.batch()
    example = inputs if job.inputs else None
    replfx.transform(subject.build(True), example)
    model = subject.build(job.small)
    before = _settled()
    twin = copy.deepcopy(model)
    copied = _status("VmRSS") - before
    del twin
    before = _settled()
    replfx.transform(model, example)
    size = unique_storage_bytes([*model.parameters(), *model.buffers()])
    return Memory(size, copied, _status("VmHWM") - before - copied)


def _settled() -> int:
    """Resident bytes, once all that is free was given back and the high-water mark was reset to them."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """A figure of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kibibytes)
