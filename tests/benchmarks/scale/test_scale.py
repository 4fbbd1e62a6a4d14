"""The scale benchmark's own pieces; and that the pass grows near-linearly, counted in calls instead of seconds."""

from __future__ import annotations

import cProfile
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import replfx
from benchmarks.scale import command
from benchmarks.scale.output import Growth, ModelRow, Results, slope, write
from benchmarks.scale.subjects import TINY, TOWERS
from benchmarks.scale.trial import PHASES, Job, Memory, Timing, memory_of, time_tower
from replfx import ReplfxError
from replfx.measure import Sample
from tests.benchmarks.parsing import parsed


@given(power=st.floats(0.1, 3), factor=st.floats(1e-6, 1e6))
def test_the_slope_of_a_power_law_is_its_power(power: float, factor: float) -> None:
    assert slope({n: factor * n**power for n in (64, 128, 1024, 4096)}) == pytest.approx(power)


def test_the_slope_is_that_of_least_squares() -> None:
    # log₂ t = 0, 2, 1 over log₂ n = 0, 1, 2: Σ(x − 1)(y − 1) / Σ(x − 1)² = (1 + 0 + 0) / 2
    assert slope({1: 1.0, 2: 4.0, 4: 2.0}) == pytest.approx(0.5)


def timing(*seconds: float, step: float | None = None) -> Timing:
    phases = {phase: Sample(tuple(i * s for s in seconds)) for i, phase in enumerate(PHASES, 1)}
    return Timing("symbolic", 3, Sample(seconds), phases, None if step is None else Sample((step,) * len(seconds)))


def test_a_models_row() -> None:
    row = ModelRow("m", True, timing(1.0, 3.0, 8.0, step=2.0), Memory(1000, 1100, 50))
    assert row.in_steps.values == (0.5, 1.5, 4.0)
    assert row.passes_in_steps == pytest.approx((2 + 3 + 4 + 5) * 3.0 / 2.0)  # all but copy and verify, at the median
    assert row.share == 0.05


def test_a_growth_has_the_slopes_of_its_phases() -> None:
    growth = Growth("modules", True, {n: timing(float(n) ** 2) for n in (2, 4, 8)})
    assert growth.slope == pytest.approx(2)
    assert growth.phase_slopes == {phase: pytest.approx(2) for phase in PHASES}


def test_rows_of_earlier_runs_stay_and_are_replaced_by_new_ones(tmp_path: Path) -> None:
    config, memory = {"repeats": 2}, Memory(1000, 1100, 50)
    first = Results(config, {})
    for name in ("resnet152", "vit_l"):
        first.add(ModelRow(name, True, timing(1.0, 3.0, step=2.0), memory, "abc"))
    first.add(Growth("modules", True, {n: timing(float(n)) for n in (2, 4, 8)}, "abc"))
    write(first, tmp_path)
    again = Results(config, {})
    again.read(tmp_path)
    assert (again.models, again.growths) == (first.models, first.growths)
    again.add(ModelRow("vit_l", True, timing(7.0, 7.0, step=2.0), memory, "def"))
    again.add(ModelRow("vit_l", False, timing(7.0, 7.0, step=2.0), memory, "def"))
    rows = [(row.model, row.inputs, row.commit) for row in again.models]
    assert rows == [("vit_l", True, "def"), ("vit_l", False, "def"), ("resnet152", True, "abc")]
    other = Results({"repeats": 3}, {})
    other.read(tmp_path)
    assert not other.models


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ReplfxError, match="no nothing; there are vit_l"):
        command.run(parsed(command, "--only", "nothing,windows"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quick_writes_its_files(tmp_path: Path) -> None:
    assert command.run(parsed(command, "--quick", "--only", "regions_1024,recorded", "--out", str(tmp_path))) == 0
    record = json.loads((tmp_path / "scale.json").read_text())
    assert [(row["model"], row["inputs"]) for row in record["models"]] == [
        ("regions_1024", True),
        ("regions_1024", False),
    ]
    assert [(row["tower"], row["inputs"], list(row["blocks"])) for row in record["growth"]] == [
        ("recorded", True, ["4", "8", "16"])
    ]
    assert record["growth"][0]["blocks"]["16"]["capture"] == "recorded"
    lines = (tmp_path / "scale.md").read_text().splitlines()
    assert sum(line.startswith("| regions_1024 |") for line in lines) == 2
    assert sum(line.startswith("| recorded |") for line in lines) == 1
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_model() -> None:
    memory = memory_of(Job("windows_1024", inputs=False, small=True))
    assert memory.model_bytes == 4 * (512 * 512 + 512) * 4


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_is_found_in_its_own_way(name: str) -> None:
    timing = time_tower(Job(name, inputs=True, blocks=5))
    assert timing.replaced == 2
    assert timing.capture == ("symbolic" if TOWERS[name].symbolic else "recorded")
    path = replfx.report(replfx.transform(TOWERS[name].build(5, TINY), torch.randn(2, TINY))).replaced[0]
    assert (path.startswith("@"), "[" in path) == (name == "regions", name == "windows")


# ---- cost


def calls_to_transform(name: str, blocks: int, inputs: bool) -> int:
    """How many functions are called: unlike time, the same on every machine."""
    model = TOWERS[name].build(blocks, TINY)
    example = torch.randn(2, TINY) if inputs else None
    with cProfile.Profile() as profile:
        made = replfx.transform(model, example)
    assert len(replfx.report(made).replaced) == (blocks - 1) // 2
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inputs"),
    [*((name, False) for name, tower in TOWERS.items() if tower.symbolic), *((name, True) for name in TOWERS)],
)
def test_transform_is_near_linear(name: str, inputs: bool) -> None:
    calls_to_transform(name, 4, inputs)  # what is imported the first time
    assert calls_to_transform(name, 320, inputs) < 10 * 1.1 * calls_to_transform(name, 32, inputs)
