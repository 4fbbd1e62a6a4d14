"""Processes that run examples/train.py, forked from one that has imported everything: that takes longer than training.

What a process does to itself (die at a moment, refuse to write much) is set up here, before the script runs.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from tests.support.processes import PRELOADED

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
ACTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*PRELOADED, "tests.examples.warm"])  # there is one such server for all tests


@dataclass
class Job:
    """A start of the script.

    Attributes:
        options: its command line.
        output: the folder for the run.
        ranks: processes that train together, as torchrun would start them.
        die_at: (text, n): the last rank kills itself with -9 just before the n-th of its acts (opening, renaming,
            removing, …) on something in the folder with this text in its path.
        file_limit: the largest file that can be written, in bytes; stands for a full disk.
        of_rank: rank → more options, for that rank alone.
    """

    options: list[str]
    output: Path
    ranks: int = 1
    die_at: tuple[str, int] | None = None
    file_limit: int | None = None
    of_rank: dict[int, list[str]] = field(default_factory=dict)

    def start(self) -> list[ForkServerProcess]:
        """Begin, and do not wait."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=_work, args=(self, rank, port)) for rank in range(self.ranks)]
        for process in processes:
            process.start()
        return processes

    def run(self, seconds: float | None = None) -> str:
        """Run to the end, or for some seconds and then kill -9; when one rank ends so do the others.

        Returns:
            nothing where all went well, "killed", or what was printed.
        """
        processes = self.start()
        left = list(processes)
        while left:
            ready = wait([process.sentinel for process in left], seconds)
            ended = [process for process in left if process.sentinel in ready]
            left = [process for process in left if process not in ended]
            if not ended or any(process.exitcode for process in ended):
                break
        died = bool(left and not ready) or -signal.SIGKILL in [process.exitcode for process in processes]
        if left and not died:
            wait([process.sentinel for process in left], 5)  # they have something to say too
        for process in processes:
            process.kill()
            process.join()
        if died:
            return "killed"
        return self.printed() if any(process.exitcode for process in processes) else ""

    def printed(self) -> str:
        """All that the ranks printed, one after the other."""
        return "\n".join(_printed(self, rank).read_text() for rank in range(self.ranks))


def _printed(job: Job, rank: int) -> Path:
    return job.output.with_name(f"{job.output.name}-{rank}.txt")


def _work(job: Job, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    if job.ranks > 1:
        values = {"RANK": rank, "WORLD_SIZE": job.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()})
    printed = os.open(_printed(job, rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    if job.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_limit, job.file_limit))
    if job.die_at is not None and rank == job.ranks - 1:
        _die_at(*job.die_at, str(job.output))
    sys.argv = [str(SCRIPT), *job.options, *job.of_rank.get(rank, ()), "--output", str(job.output)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def _die_at(text: str, count: int, folder: str) -> None:
    left = count

    def watch(event: str, values: tuple[object, ...]) -> None:
        nonlocal left
        if event in ACTS and str(values[0]).startswith(folder) and text in str(values[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
