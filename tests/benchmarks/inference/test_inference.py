"""The inference benchmark: what it measures, on models that a test can wait for."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from benchmarks.inference import command
from benchmarks.inference.output import Row
from benchmarks.inference.subjects import BOUNDS, FULL, Way, runnable, to_int8, ways_of, weight_bytes
from benchmarks.models import SUBJECTS, Subject
from replfx import ReplfxError
from replfx.demo.model import GPT
from tests.benchmarks.parsing import parsed

CPU = torch.device("cpu")
SMALL = Subject(
    lambda kind: GPT(256, 128, width=32, depth=5, heads=2),
    lambda kind, count: (torch.randint(256, (count, 16)), torch.randint(256, (count, 16))),
    {"cpu": 2},
)


def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def importing(name: str, *rest: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.slow
def test_the_command_measures_each_way_at_each_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUBJECTS, "gpt", SMALL)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    without_torchao(monkeypatch)
    args = parsed(
        command, "--quick", "--models", "gpt", "--operators", "light", "--device", "cpu", "--out", str(tmp_path)
    )
    assert command.run(args) == 0
    written = json.loads((tmp_path / "inference.json").read_text())
    names = [way.name for way in ways_of(["light"])]
    for batch in (1, 2):
        rows = {row["variant"]: row for row in written["results"] if row["batch"] == batch}
        assert sorted(rows) == sorted(names)
        assert "torchao is not installed" in rows.pop("light materialized INT8")["reason"]
        assert set(rows["full"]["latency_over_full"]["raw"]) == {1.0}
        for row in rows.values():
            assert row["examples_a_second"]["median"] == pytest.approx(batch / row["latency_seconds"]["median"])
        sizes = [rows[name]["weight_bytes"] for name in ("removed", "light materialized", "full")]
        assert sizes == sorted(set(sizes))
    assert written["config"]["batches"] == [1, 2]
    assert {"torch", "device", "commit"} <= written["environment"].keys()
    assert (tmp_path / "inference.md").read_text().count("| gpt |") == 2 * len(names)
    assert (tmp_path / "inference.png").stat().st_size > 1000


def test_models_run_in_evaluation_mode_and_only_transformed_ones_hold_fusion_layers() -> None:
    def kinds(way: Way) -> set[str]:
        model = runnable(SMALL, way, CPU).call
        assert not any(module.training for module in model.modules())
        return {type(module).__name__ for module in model.modules()}

    for way in ways_of(["block", "light"]):
        if not way.compiled and not way.int8:
            assert ("Synthesis" in kinds(way)) == way.name.endswith("transformed")
    assert FULL in BOUNDS


def test_bytes_of_views_count_once() -> None:
    tensor = torch.zeros(8)
    assert weight_bytes([tensor, tensor[:2], torch.zeros(2, dtype=torch.int8)]) == 34


@pytest.mark.integrations
def test_int8_takes_a_quarter() -> None:
    pytest.importorskip("torchao")
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    before = weight_bytes(layer.parameters())
    to_int8(layer)
    # Of each row there are a scale in float32 and a zero point too.
    assert before / 4 < weight_bytes(layer.parameters()) <= before / 4 + 8 * 64


def test_what_has_no_such_operator_has_its_reason() -> None:
    row = Row("gpt", "light transformed", 1, reason="no such thing")
    assert row.cells()[:4] == ["gpt", "light transformed", "1", "n/a: no such thing"]
    assert row.to_dict() == {"model": "gpt", "variant": "light transformed", "batch": 1, "reason": "no such thing"}
    with pytest.raises(ReplfxError, match="nonesuch"):
        runnable(SMALL, Way("none", "nonesuch"), CPU)


def test_batch_sizes_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(command, "--batches", "1,64").batches == [1, 64]
    for text in ("0", "1,x", "1,,2"):
        with pytest.raises(SystemExit):
            parsed(command, "--batches", text)
        assert "no batch size" in capsys.readouterr().err
