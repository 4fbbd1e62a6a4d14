"""Workers started, fed with jobs and replaced when they die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO, Any

from benchmarks.zoo.worker import Job

ROOT = Path(__file__).parents[2]
# One thread a model: the pools of OpenMP and BLAS do not survive the worker's forks, and times stay comparable.
ALONE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """A worker process; use it as a context.

    Args:
        modules: what it imports before the first fork.
        log: where it and its children write what they have to say.
    """

    def __init__(self, modules: Sequence[str], log: Path) -> None:
        self.modules, self.log = modules, log
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.zoo.worker", *self.modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | ALONE | OFFLINE | {"PYTHONPATH": path},
            )

    def record_of(self, job: Job) -> dict[str, Any]:
        """Try a model; should the worker itself die over it, that is the record, and a new one takes its place."""
        stdin, stdout = self._pipes()
        try:
            print(job.to_json(), file=stdin, flush=True)
            line = stdout.readline()
        except OSError:
            line = ""
        if line:
            record: dict[str, Any] = json.loads(line)
            return record
        status = self.process.wait()
        self.process = self._start()
        error = f"the worker exited with status {status}, see {self.log.name}"
        return {"name": job.name, "family": "", "status": "failure", "stage": "worker", "error": error, "peers": {}}

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stdin, stdout = self._pipes()
        self.process.terminate()
        self.process.wait()
        stdin.close()
        stdout.close()


def run_all(
    jobs: Sequence[Job],
    workers: int,
    log: Path,
    on_start: Callable[[Job], object],
    on_record: Callable[[Mapping[str, Any]], object],
) -> None:
    """Try all models, `workers` of them at a time; records come in the order in which they are ready."""
    modules = sorted({job.module for job in jobs})
    queue: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        queue.put(job)
    stopped = False

    def work() -> None:
        with Worker(modules, log) as worker:
            while not stopped:
                try:
                    job = queue.get_nowait()
                except Empty:
                    return
                on_start(job)
                on_record(worker.record_of(job))

    with ThreadPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        futures = [pool.submit(work) for _ in range(min(workers, len(jobs)))]
        try:
            for future in futures:
                future.result()
        finally:
            stopped = True
