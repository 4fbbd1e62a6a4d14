"""examples/train.py: killed at any moment it goes on as if nothing had been; what cannot be resumed is refused."""

from __future__ import annotations

import csv
import json
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.examples.processes import Job

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without torch.distributed")

STEPS, EVERY = 40, 7
# drop_path draws random numbers in training: without their state a resumed run would draw others.
OPTIONS = [
    *("--data", "fake", "--model", "test_vit", "--image-size", "32", "--operator", "light", "--workers", "0"),
    *("--model-options", '{"img_size": 32, "depth": 3, "drop_path_rate": 0.2}', "--batch-size", "2"),
    *("--steps", str(STEPS), "--save-every", str(EVERY)),
]
KILLS = 10

Rows = list[tuple[str, str, str]]


def rows_of(output: Path) -> Rows:
    """Step, loss and learning rate of each line of a log, as they are written there."""
    with (output / "log.csv").open() as file:
        return [(row["step"], row["loss"], row["learning_rate"]) for row in csv.DictReader(file)]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*step-*"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, float]:
    """An uninterrupted run: its log, and the seconds that it took."""
    output = tmp_path_factory.mktemp("reference") / "run"
    begun = time.monotonic()
    assert not Job(OPTIONS, output).run()
    seconds = time.monotonic() - begun
    rows = rows_of(output)
    assert [row[0] for row in rows] == [str(step) for step in range(1, STEPS + 1)]
    assert len({row[1] for row in rows}) == STEPS
    assert checkpoints(output) == ["step-000000035", "step-000000040"]
    return rows, seconds


@pytest.fixture
def halfway(tmp_path: Path) -> Path:
    """A run that was killed after its checkpoints of 7 and 14 steps."""
    output = tmp_path / "run"
    process = Job(OPTIONS, output).start()
    while checkpoints(output)[-1:] != ["step-000000014"]:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    return output


# ---- killed


def test_killed_ten_times_it_has_the_same_losses(reference: tuple[Rows, float], tmp_path: Path) -> None:
    """By turns at a drawn time, and before a drawn act on its files."""
    rows, seconds = reference
    drawn = random.Random(0)
    kills = 0
    for number in range(4 * KILLS):
        output = tmp_path / f"run{number}"
        while not (output / "log.csv").exists() or rows_of(output)[-1:] != rows[-1:]:
            process = Job(OPTIONS, output, die_at=drawn.randint(1, 40) if kills % 2 else None).start()
            process.join(None if kills % 2 else drawn.uniform(0, seconds))
            process.kill()
            process.join()
            kills += process.exitcode == -9
            assert process.exitcode in (0, -9), process.exitcode
        if kills >= KILLS:
            break
    assert not Job(OPTIONS, output).run()
    assert rows_of(output) == rows
    assert kills >= KILLS
