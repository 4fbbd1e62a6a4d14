"""The zoo's harness, with toys: bounds on time and memory, deaths, peers, and runs that go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import store
from benchmarks.zoo import command, peers
from benchmarks.zoo.output import write
from benchmarks.zoo.runner import Worker
from benchmarks.zoo.worker import Job, Limits
from tests.benchmarks.parsing import parsed
from tests.benchmarks.zoo import toys

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A process of its own, that forks: one that has run a backward pass, as pytest's has, cannot be forked."""
    log = tmp_path_factory.mktemp("zoo") / "zoo.log"
    with Worker(["tests.benchmarks.zoo.toys", "tests.benchmarks.zoo.toy_peers"], log) as started:
        yield started


def toy(worker: Worker, name: str, *peers: str, **limits: Any) -> dict[str, Any]:
    return worker.record_of(Job("tests.benchmarks.zoo.toys", f"toys:{name}", list(peers), Limits(**limits)))


@pytest.mark.parametrize(
    ("name", "limits", "stage", "error"),
    [
        pytest.param("hangs", {"check_seconds": 2.0}, "timeout", "more than 2 s, in original", marks=pytest.mark.slow),
        ("eats", {"memory": 2**31}, "memory", "more than 2 GiB, in original"),
        ("exits", {}, "original", "exited with status 3"),
        ("crashes", {}, "original", "killed by SIGSEGV"),
        ("fails", {}, "original", "RuntimeError: not today"),
    ],
)
def test_a_model_that_ends_badly_is_a_record(
    worker: Worker, name: str, limits: dict[str, Any], stage: str, error: str
) -> None:
    record = toy(worker, name, **limits)
    assert (record["name"], record["family"], record["status"]) == (f"toys:{name}", "toy", "failure")
    assert record["stage"] == stage
    assert error in record["error"]


def test_a_model_that_ends_well(worker: Worker) -> None:
    record = toy(worker, "tower")
    assert record["status"] == "replaced"
    assert record["peak_mib"] > 0
    json.dumps(record)


def test_a_peer_that_hangs_or_dies_costs_nobody_else_a_result(worker: Worker) -> None:
    record = toy(worker, "tower", "hangs", "fails", "exits", "works", "in eval", peer_seconds=2.0)
    assert record["status"] == "replaced"
    assert {name: result["works"] for name, result in record["peers"].items()} == {
        "hangs": False,
        "fails": False,
        "exits": False,
        "works": True,
        "in eval": True,
    }
    assert record["peers"]["hangs"]["error"] == "timeout: more than 2 s"
    assert record["peers"]["fails"]["error"] == "RuntimeError: not today"
    assert record["peers"]["exits"]["error"] == "exited with status 4"


def test_peers_work_on_a_model_that_all_can_take(worker: Worker) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("torch_pruning")
    record = toy(worker, "tower", *peers.PEERS)
    assert {name: result["works"] for name, result in record["peers"].items()} == dict.fromkeys(peers.PEERS, True)


# ---- records


def test_a_line_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "zoo.jsonl"
    assert store.read(path) == {}
    store.append(path, {"name": "a", "status": "replaced"})
    with path.open("a") as file:
        file.write('{"name": "b", "sta')
    assert list(store.read(path)) == ["a"]
    store.append(path, {"name": "c", "status": "refused"})
    store.append(path, {"name": "a", "status": "failure"})
    assert {name: record["status"] for name, record in store.read(path).items()} == {"c": "refused", "a": "failure"}


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(command, "SOURCES", ("toys",))
    monkeypatch.setattr(command, "module_of", lambda source: toys)
    lines = tmp_path / "zoo.jsonl"
    done = {"name": "toys:tower", "family": "toy", "status": "replaced", "seconds": 1.0, "reasons": [], "peers": {}}
    lines.write_text(json.dumps(done) + '\n{"name": "toys:short", "fam')

    def run(*options: str) -> dict[str, Any]:
        words = ("--source", "toys", "--no-peers", "--out", str(tmp_path), *options)
        assert command.run(parsed(command, *words)) == 0
        return {record["name"]: record for record in json.loads((tmp_path / "zoo.json").read_text())["results"]}

    found = run("--workers", "2")
    assert {name: record["status"] for name, record in found.items()} == {
        "toys:tower": "replaced",
        "toys:short": "refused",
        "toys:fails": "failure",
    }
    assert found["toys:tower"] == done  # it was not tried again
    assert "commit" in found["toys:short"]["versions"]
    text = (tmp_path / "zoo.md").read_text()
    assert "| toy | 3 | 1 | 1 | 1 |" in text
    assert "toys:fails: `original: RuntimeError: not today`" in text

    count = len(lines.read_text().splitlines())
    run("--report", "--rerun", "failure")
    run("--only", "toys:t*")
    assert len(lines.read_text().splitlines()) == count
    run("--rerun", "failure")
    assert len(lines.read_text().splitlines()) == count + 1


def test_tables_count_a_family_and_a_peer(tmp_path: Path) -> None:
    def record(name: str, family: str, status: str, **works: bool) -> dict[str, Any]:
        tried = {peer.replace("_", "."): {"works": result} for peer, result in works.items()}
        why = {"stage": "x", "error": "E: `e`", "reasons": ["why"]}
        return {"name": name, "family": family, "status": status, **why, "peers": tried}

    records = [
        record("timm:a", "vit", "replaced", torch_fx=True),
        record("timm:b", "vit", "refused", torch_fx=False),
        record("timm:c", "swin", "failure"),
    ]
    write(records, {}, tmp_path)
    text = (tmp_path / "zoo.md").read_text()
    assert "| vit | 2 | 1 | 1 | 0 | 1/2 | – | – | – |" in text
    assert "| swin | 1 | 0 | 0 | 1 | – | – | – | – |" in text
    assert "| all | 3 | 1 | 1 | 1 | 1/2 | – | – | – |" in text
    assert "- timm:c: `` x: E: `e` ``" in text
    assert "- timm:b\n  - why" in text
