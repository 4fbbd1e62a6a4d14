"""The compile benchmark: what it measures, on models that a test can wait for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from benchmarks.compiling import command, kernels, traffic
from benchmarks.compiling.output import StepRow
from benchmarks.compiling.subjects import SUBJECTS, WAYS, training_of, ways_on
from replfx.measure import trainable_parameters
from tests.benchmarks.parsing import parsed

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_quick_models_have_blocks_to_replace(name: str) -> None:
    full, replaced, removed = (
        training_of(SUBJECTS[name], replace(way, compiler=None), "light", CPU, batch=2, quick=True, bf16=False)
        for way in (WAYS[0], WAYS[1], WAYS[3])
    )
    counts = [trainable_parameters(t.model) for t in (full, replaced, removed)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 3
    replaced.step()


@pytest.mark.slow
def test_the_command_measures_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [replace(way, compiler=way.compiler and "aot_eager") for way in ways_on(CPU)]
    monkeypatch.setattr(command, "ways_on", lambda device: ways)
    options = ("--quick", "--no-kernels", "--models", "gpt2", "--device", "cpu", "--operator", "light")
    assert command.run(parsed(command, *options, "--out", str(tmp_path))) == 0
    written = json.loads((tmp_path / "compile.json").read_text())
    rows = {row["variant"]: row for row in written["steps"]}
    assert list(rows) == [way.name for way in ways] == [way.name for way in WAYS if not way.kernels]
    assert all((row["compile_seconds"] is None) == name.startswith("eager") for name, row in rows.items())
    goal = rows["backend replfx"]["goal_seconds"]
    assert goal > 1.02 * rows["Inductor removed"]["step_seconds"]["median"]
    assert [row["goal_seconds"] for row in rows.values() if row["goal_seconds"]] == [goal]
    assert set(rows["Inductor full"]["step_over_inductor_full"]["raw"]) == {1.0}
    assert {"torch", "device", "commit", "gemm_flops_a_second"} <= written["environment"].keys()
    assert (tmp_path / "compile.md").read_text().count("| gpt2 |") == len(ways)
    assert (tmp_path / "compile.png").stat().st_size > 1000


def test_a_variant_that_does_not_exist_has_its_reason() -> None:
    row = StepRow("gpt2", "eager replfx", reason="no such thing")
    assert row.cells()[:3] == ["gpt2", "eager replfx", "n/a: no such thing"]
    assert row.to_dict() == {"model": "gpt2", "variant": "eager replfx", "reason": "no such thing"}


def test_the_providers_of_a_kernel_compute_the_same() -> None:
    def tensors(found: Any) -> list[torch.Tensor]:
        return [found] if isinstance(found, torch.Tensor) else list(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        torch.manual_seed(0)
        found = list(kernels.cases(CPU, torch.float32, quick=True))
    assert len(found) == 4
    for case in found:
        expected = tensors(case.providers["eager"]())
        assert case.bytes_moved >= sum(t.nbytes for t in expected)
        for name in ("Inductor", "replfx"):
            # The same few operations in float32, rounded in other places.
            torch.testing.assert_close(tensors(case.providers[name]()), expected, rtol=1e-4, atol=1e-4)
    assert kernels.copy_rate(CPU, quick=True) > 0
    assert kernels.gemm_rate(CPU, torch.float32, quick=True) > 0


def test_bytes_moved() -> None:
    w, half, one = torch.empty(8, 8), torch.empty(8), torch.empty(1, dtype=torch.float32)
    assert traffic.synthesize([w, w], [w, w], [half, one], [half, one]) == traffic.Traffic(1096, 512)
    assert traffic.synthesize_backward([w], [w], [w], [half], [half]) == traffic.Traffic(832, 576)
    # A scalar's partial sums, one a row of 64 elements for so small a tensor, each written and read.
    assert traffic.synthesize_backward([w], [w], [w], [one], [one]) == traffic.Traffic(784, 528)
