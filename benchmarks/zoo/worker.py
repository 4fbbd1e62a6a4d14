"""The process that tries models, each in a child of its own with bounds on time and memory.

It has imported torch and the model libraries once and forks for each model, which saves some ten seconds a model.
It reads a job a line from its standard input and writes a record a line to its standard output, both as JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.zoo.subject import Subject

CHECK = "check"
POLL_SECONDS = 0.05
Send = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True)
class Limits:
    """What one model may take: seconds for the check, seconds for each peer, bytes; and how large peers' may be."""

    check_seconds: float = 300.0
    peer_seconds: float = 60.0
    memory: int = 12 * 2**30
    peer_parameters: float = math.inf

    def seconds(self, task: str) -> float:
        """The time for a task."""
        return self.check_seconds if task == CHECK else self.peer_seconds


@dataclass(frozen=True)
class Job:
    """A model to try: the module that knows it by its name, the peers to let try it as well, and our operator."""

    module: str
    name: str
    peers: list[str] = field(default_factory=list)
    limits: Limits = Limits()
    operator: str = "block"

    @classmethod
    def from_json(cls, line: str) -> Job:
        """Read what `to_json` wrote."""
        data = json.loads(line)
        return cls(**{**data, "limits": Limits(**data["limits"])})

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))


@dataclass
class _Watched:
    """What is known of a child: its task, what the task knows so far, and the results that it has sent."""

    task: str
    began: float = field(default_factory=time.monotonic)
    draft: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take in a message."""
        if "task" in message:
            self.task, self.began = message["task"], time.monotonic()
        if "draft" in message:
            self.draft = message["draft"]
        if "result" in message:
            self.results[self.task] = message["result"]

    def casualty(self, end: str) -> dict[str, Any]:
        """The result of a task that did not live to give one."""
        seconds = round(time.monotonic() - self.began, 2)
        if self.task != CHECK:
            return {"works": False, "error": end, "seconds": seconds}
        at, kind = self.draft.get("stage", "start"), end.partition(":")[0]
        stage = kind if kind in ("timeout", "memory") else at
        return {**self.draft, "status": "failure", "stage": stage, "error": f"{end}, in {at}", "seconds": seconds}


def record_of(job: Job) -> dict[str, Any]:
    """Try a model; a task that kills its child, or is killed for its time or memory, costs no other its result."""
    results: dict[str, dict[str, Any]] = {}
    pending = [CHECK, *job.peers]
    while pending:
        watched, end = _watch(job, pending, results.get(CHECK, {}))
        results |= watched.results
        if watched.task not in results:
            results[watched.task] = watched.casualty(end or "the process ended without a result")
        pending = [task for task in pending if task not in results]
        if results[CHECK].get("stage") == "original":  # nobody can do anything with a model that does not run
            break
    record = results.pop(CHECK)
    return {"name": job.name, "family": record.pop("family", ""), **record, "peers": results}


def _watch(job: Job, tasks: list[str], checked: Mapping[str, Any]) -> tuple[_Watched, str | None]:
    """Fork a child for the tasks and wait for it; gives what it sent, and how it ended if not well."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(job, tasks, checked, writer)
    os.close(writer)
    watched, rest, why = _Watched(tasks[0]), b"", None
    try:
        while True:
            if select.select([reader], [], [], POLL_SECONDS)[0]:
                data = os.read(reader, 2**16)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    watched.hear(json.loads(line))
            if why is None and (why := _excess(child, watched, job.limits)):
                os.kill(child, signal.SIGKILL)
    finally:
        os.close(reader)
        status = _ended(child)
    if why is None and status != 0:
        why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    return watched, why


def _ended(child: int) -> int:
    """Wait for a child that has closed its pipe, or make an end of it."""
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _excess(child: int, watched: _Watched, limits: Limits) -> str | None:
    seconds = limits.seconds(watched.task)
    if time.monotonic() - watched.began > seconds:
        return f"timeout: more than {seconds:g} s"
    if _resident(child) > limits.memory:
        return f"memory: more than {limits.memory / 2**30:.3g} GiB"
    return None


def _resident(process: int) -> int:
    """Resident bytes of a process; torch reserves far more address space than it uses, so no rlimit will do."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _child(job: Job, tasks: list[str], checked: Mapping[str, Any], writer: int) -> None:
    """Run the tasks one after the other and say what became of each; never returns."""
    # Should the parent be gone, nobody else would end this.
    signal.alarm(int(sum(job.limits.seconds(task) for task in tasks)) + 60)
    status = 1
    try:
        with os.fdopen(writer, "w", buffering=1) as pipe:
            _work(job, tasks, checked, lambda message: print(json.dumps(message), file=pipe, flush=True))
        status = 0
    except BaseException as error:
        print(f"{job.name}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def _work(job: Job, tasks: list[str], checked: Mapping[str, Any], send: Send) -> None:
    from benchmarks.zoo.check import check
    from benchmarks.zoo.peers import Trial

    subject: Subject = importlib.import_module(job.module).subject(job.name)
    family, trial = {"family": subject.family}, Trial(subject.variants[checked.get("variant") or 0])
    result: dict[str, Any]
    for task in tasks:
        send({"task": task})
        began = time.perf_counter()
        if task == CHECK:
            result = {
                **family,
                **check(subject, job.operator, lambda draft: send({"draft": family | draft.to_dict()})).to_dict(),
            }
            trial, checked = Trial(subject.variants[result["variant"] or 0]), result
        elif (size := checked.get("parameters_before") or 0) > job.limits.peer_parameters:
            result = {"works": None, "error": f"not tried: {size:,} parameters", "seconds": 0.0}
        else:
            result = {**trial(task), "seconds": round(time.perf_counter() - began, 2)}
        send({"result": result})
        gc.collect()


def warm_up(modules: list[str]) -> None:
    """Import what all children need, and run each machinery once that is slow the first time."""
    import torch

    imported = "torch_pruning", "torchvision.models.feature_extraction", "benchmarks.zoo.check", "benchmarks.zoo.peers"
    for module in (*imported, *modules):
        importlib.import_module(module)
    linear, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)
    torch.export.export(linear, (x,), strict=False)
    gc.collect()
    gc.freeze()


def serve(jobs: TextIO, records: TextIO) -> None:
    """Try model after model until there are no more jobs."""
    for line in jobs:
        print(json.dumps(record_of(Job.from_json(line))), file=records, flush=True)


def main(modules: list[str]) -> None:
    """Keep standard output for records: what the libraries print goes to standard error."""
    warnings.filterwarnings("ignore")
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)  # a thread pool does not survive a fork
    warm_up(modules)
    serve(sys.stdin, records)


if __name__ == "__main__":
    main(sys.argv[1:])
