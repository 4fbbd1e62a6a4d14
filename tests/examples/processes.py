"""Processes that run examples/train.py, forked from one that has imported everything: that takes longer than training.

What a process does to itself (die at a moment, refuse to write much) is set up here, before the script runs.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
ACTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.examples.warm"])


@dataclass
class Job:
    """A start of the script.

    Attributes:
        options: its command line.
        output: the folder for the run.
        die_at: kill -9 itself before it does its n-th thing to files in that folder.
        file_limit: the largest file that it can write, in bytes; stands for a full disk.
        environment: what torchrun would set.
    """

    options: list[str]
    output: Path
    die_at: int | None = None
    file_limit: int | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def printed(self) -> Path:
        """Where what it prints goes."""
        return self.output.with_name(f"{self.output.name}-{self.environment.get('RANK', 0)}.txt")

    def start(self) -> ForkServerProcess:
        """Begin, and do not wait."""
        process = context.Process(target=_work, args=(self,), daemon=True)
        process.start()
        return process

    def run(self) -> str:
        """Run to its end; gives what was printed where it failed, and nothing where it did not."""
        process = self.start()
        process.join()
        return "" if process.exitcode == 0 else f"{process.exitcode}: {self.printed.read_text()}"


def _work(job: Job) -> None:
    torch.set_num_threads(1)
    os.environ.update(job.environment)
    printed = os.open(job.printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    if job.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_limit, job.file_limit))
    if job.die_at is not None:
        _die_at(job.die_at, str(job.output))
    sys.argv = [str(SCRIPT), *job.options, "--output", str(job.output)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def _die_at(count: int, folder: str) -> None:
    left = count

    def watch(event: str, values: tuple[object, ...]) -> None:
        nonlocal left
        if event in ACTS and str(values[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
