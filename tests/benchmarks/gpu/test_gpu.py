"""The GPU session: its data, its report, and all of it in small on the CPU."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from benchmarks.gpu import command, data, report
from benchmarks.gpu.workers import Record, Team
from tests.benchmarks.accuracy.pictures import drawn, write
from tests.benchmarks.parsing import parsed


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A CIFAR-10 of two classes of pictures that JPEG takes nearly whole, packed."""
    for split, count in (("train", 20), ("test", 8)):
        for number in range(count):
            for label, shade in enumerate((40, 200)):
                pixels = drawn(number, 32, 32) // 16 + shade
                write(tmp_path / "cifar10" / split / str(label) / f"{number:02}.png", pixels)
    path = tmp_path / "cifar10.npz"
    assert data.pack(tmp_path, path) == path.stat().st_size
    return path


def test_what_is_packed_is_unpacked(pictures: Path) -> None:
    images = data.unpacked(pictures)
    assert images.train.shape == (40, 3, 32, 32)
    assert images.test.shape == (16, 3, 32, 32)
    assert images.train_labels.tolist() == [0] * 20 + [1] * 20
    for index in (0, 19, 20):
        wanted = torch.from_numpy(drawn(index % 20, 32, 32) // 16).permute(2, 0, 1) + (40, 200)[index >= 20]
        assert (images.train[index].int() - wanted.int()).abs().float().mean() < 4


def test_sources_are_taken_once_and_split_by_package(tmp_path: Path) -> None:
    texts = {f"package{i}/m.py": f"# {i}\n" * 500 for i in range(30)}
    for name, text in {**texts, "package0/copy.py": texts["package1/m.py"], "package1/data.txt": "x" * 9999}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = data.sources(16, 1_000_000, tmp_path)
    train, valid = (bytes(part.tolist()).decode() for part in (found.train, found.valid))
    assert "x" not in train + valid
    for i in range(30):
        assert train.count(f"# {i}\n") + valid.count(f"# {i}\n") == 500
        assert not (train.count(f"# {i}\n") and valid.count(f"# {i}\n"))
    with pytest.raises(data.ReplfxError, match="too few"):
        data.sources(16, 1_000_000, tmp_path / "package0")


@dataclass(frozen=True)
class Fake:
    """A job of no model."""

    name: str
    trouble: str = ""

    def prepare(self) -> Fake:
        if self.trouble == "raises":
            raise ValueError("no such thing")
        time.sleep(60 if self.trouble == "hangs" else 0)
        return self

    def timed(self) -> Record:
        return {"seconds": {"raw": [1.0]}}

    def work(self, steps: int, deadline: float, say: Any) -> tuple[str, Record]:
        say("point", {"at": 1})
        return "done", {"at": steps}


@pytest.mark.slow
def test_one_that_fails_or_hangs_holds_nobody_up() -> None:
    with Team([Fake("a"), Fake("b", "raises"), Fake("c", "hangs")], 1) as team:
        deadline = time.time() + 20
        ready = [name for name, kind, _ in team.answers(team.names, deadline) if kind == "ready"]
        assert ready == ["a"]
        assert team.names == ["a"]
        assert "no such thing" in team.failed["b"]
        assert "too long" in team.failed["c"]
        team.ask("a", "go", 7, deadline)
        said = [(kind, content) for _, kind, content in team.answers(["a"], time.time() + 30)]
        assert said == [("point", {"at": 1}), ("done", {"at": 7})]


def test_time_alone_is_fulls_once_a_model_has_grown(tmp_path: Path) -> None:
    def seconds(value: float) -> Record:
        return {"seconds": {"median": value}, "peak_training_bytes": 2**20, "trainable_parameters": 10}

    grown = "python/stacking:at=0.5:lr=2e-3"
    curve = [{"step": step, "metric": 3.0 - step / 10} for step in (5, 10)]
    rest = {"kind": "run", "part": "language", "steps": 10, "curve": curve}
    records: list[Record] = [
        {"name": "session", "kind": "session", "device": "some", "date": "2026-01-01", "quick": False}
        | dict.fromkeys(("torch", "python", "replfx", "platform", "commit"), "0"),
        {
            "name": "p",
            "kind": "plan",
            "part": "language",
            "alone": {"python/full:lr=1e-3": seconds(2), grown: seconds(1)},
        },
        {"name": grown, "status": "done", **rest},
        {"name": "python/full:lr=1e-3", "status": "cut", **rest},
    ]
    assert report.write(records, tmp_path) == [tmp_path / "gpu.md", tmp_path / "gpu.png"]
    cells = [[cell.strip() for cell in line.split("|")] for line in (tmp_path / "gpu.md").read_text().splitlines()]
    rows = {row[1]: row for row in cells if len(row) > 1}
    assert rows["stacking:at=0.5:lr=2e-3"][5] == "15"
    assert rows["full:lr=1e-3"][5] == "20"
    assert rows["full:lr=1e-3"][2] == "10 of 10, cut"


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path: Path, pictures: Path) -> None:
    places = ("--images", str(pictures), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"))
    given = parsed(command, "--device", "cpu", "--quick", "--minutes", "9", *places)
    assert command.run(given) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    runs = {record["name"]: record for record in records if record["kind"] == "run"}
    assert len(runs) == 6
    assert all(run["status"] == "done" and run["at"] == run["steps"] for run in runs.values())
    assert {record["model"] for record in records if record["kind"] == "step"} == {"gpt2"}
    assert {record["part"]: record["status"] for record in records if record["kind"] == "command"} == {
        "kernels": "done",
        "tests": "done",
    }
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert all(head in page for head in ("## python", "## resnet20", "## Steps", "## Kernels", "tests: done"))
    assert (tmp_path / "out" / "gpu.png").stat().st_size > 10_000
    lines = len(records)
    assert command.run(given) == 0  # there is nothing left to do but to say what it is
    assert len((tmp_path / "out" / "gpu.jsonl").read_text().splitlines()) == lines + 1
