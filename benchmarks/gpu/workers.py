"""Processes side by side on one device: each prepares and compiles, is timed alone, and then works along with all.

The one that leads them sends ("time",) or ("go", steps, deadline) and gets ("ready", seconds), ("timed", figures),
("point", record), ("done", record), ("cut", record) or ("failed", why).
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from replfx.measure import Sample, interleaved_times, peak_training_bytes

Record = dict[str, Any]
Say = Callable[..., None]


class Job(Protocol):
    """What a process does. It is sent to it, so it is plain data."""

    @property
    def name(self) -> str:
        """Of its record."""

    def prepare(self) -> Prepared:
        """Build, and compile by running."""


class Prepared(Protocol):
    """A job that has been compiled."""

    def timed(self) -> Record:
        """What a step costs with the device to itself."""

    def work(self, steps: int, deadline: float, say: Say) -> tuple[str, Record]:
        """Work until the end ("done") or the deadline ("cut"), by `time.time()`."""


def serve(job: Job, connection: Connection, threads: int) -> None:
    """What a process does: answers one request after the other."""
    torch.set_num_threads(threads)
    try:
        start = time.perf_counter()
        prepared = job.prepare()
        connection.send(("ready", time.perf_counter() - start))
        while True:
            request, *rest = connection.recv()
            if request == "time":
                connection.send(("timed", prepared.timed()))
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()  # the next one may need it
            elif request == "go":
                steps, deadline = rest
                connection.send(prepared.work(steps, deadline, lambda *said: connection.send(said)))
            else:
                return
    except EOFError:
        return
    except Exception:
        with suppress(OSError):  # nobody listens any more
            connection.send(("failed", traceback.format_exc()))


@dataclass
class _Member:
    process: multiprocessing.process.BaseProcess
    connection: Connection


class Team:
    """The processes of some jobs.

    Args:
        jobs: one process each.
        threads: of each on the CPU.
    """

    def __init__(self, jobs: Sequence[Job], threads: int) -> None:
        # One clean process imports everything once, and all others are its children; none has touched the device.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.gpu.jobs"])
        self._members: dict[str, _Member] = {}
        self.failed: dict[str, str] = {}
        for job in jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(job, theirs, threads), daemon=True)
            process.start()
            theirs.close()
            self._members[job.name] = _Member(process, ours)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._members):
            self._end(name)

    @property
    def names(self) -> list[str]:
        """Those that are at work."""
        return list(self._members)

    def ask(self, name: str, *request: object) -> None:
        """Send a request to one."""
        with suppress(OSError):  # it has ended, which `answers` will say
            self._members[name].connection.send(request)

    def answers(self, names: Sequence[str], deadline: float) -> Iterator[tuple[str, str, Any]]:
        """Name, kind and content of all that these say until each has answered; who is late is ended."""
        left = {name for name in names if name in self._members}
        while left:
            connections = {self._members[name].connection: name for name in left}
            ready = wait(list(connections), timeout=max(0.0, deadline - time.time()))
            if not ready:
                for name in sorted(left):
                    self.failed[name] = "it took too long, and was ended"
                    self._end(name)
                return
            for connection in ready:
                name = connections[connection]  # type: ignore[index]
                try:
                    kind, content = self._members[name].connection.recv()
                except (EOFError, OSError):
                    kind, content = "failed", "its process ended"
                if kind == "failed":
                    self.failed[name] = content
                    self._end(name)
                if kind != "point":
                    left.discard(name)
                yield name, kind, content

    def _end(self, name: str) -> None:
        member = self._members.pop(name)
        with suppress(OSError):
            member.connection.send(("stop",))
        member.connection.close()
        member.process.join(1)
        member.process.terminate()
        member.process.join(5)
        if member.process.is_alive():
            member.process.kill()


def step_costs(step: Callable[[], object], model: Any, optimizer: Any, device: torch.device, repeats: int) -> Record:
    """Seconds of a step with the device to itself, and its peak memory."""
    peak = peak_training_bytes(step, model, optimizer, device)
    seconds = interleaved_times({"step": step}, repeats, warmup=0)["step"]
    return {"seconds": seconds.to_dict(), "peak_training_bytes": peak}


def merged(figures: Sequence[Mapping[str, Any]]) -> Record:
    """What was timed several times, as one."""
    raw = [value for one in figures for value in one["seconds"]["raw"]]
    return {**figures[-1], "seconds": Sample(tuple(raw)).to_dict()}
