"""The accuracy benchmark's arithmetic against calculations of its own, and the command from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.accuracy import command
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.report import Difference, removed_like, rows_of
from benchmarks.accuracy.tasks import ACCURACY, NATS, TASKS
from replfx import ReplfxError
from replfx.demo.model import GPT
from tests.benchmarks.parsing import parsed

# Student's t at 97.5 %, from a printed table.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("freedom", T_TABLE)
def test_the_interval_is_students(freedom: int) -> None:
    rng = np.random.default_rng(freedom)
    one, other = rng.normal(size=(2, freedom + 1))
    found = Difference.of(dict(enumerate(one)), dict(enumerate(other)))
    half = T_TABLE[freedom] * np.std(one - other, ddof=1) / math.sqrt(freedom + 1)
    assert found.mean == pytest.approx(np.mean(one) - np.mean(other))
    assert found.interval[0] == pytest.approx(found.mean - half, abs=2e-3 * half)
    assert found.interval[1] == pytest.approx(found.mean + half, abs=2e-3 * half)
    assert found.pairs == freedom + 1
    assert found.error == pytest.approx(half / T_TABLE[freedom])


metrics = st.dictionaries(st.integers(0, 6), st.floats(-100, 100, width=32), max_size=6)


@given(one=metrics, other=metrics)
def test_differences_are_paired_by_seed(one: dict[int, float], other: dict[int, float]) -> None:
    found, shared = Difference.of(one, other), set(one) & set(other)
    if not shared:
        assert found is None
        return
    assert found.pairs == len(shared)
    assert (found.interval is None) == (len(shared) == 1)
    assert found.mean == pytest.approx(sum(one[s] - other[s] for s in shared) / len(shared), abs=1e-9)


def cost(variant: str, ratio: float, peak: int) -> dict[str, Any]:
    figures = {"trainable_parameters": 10, "peak_training_bytes": peak, "step_over_full": {"median": ratio}}
    return {"kind": "cost", "variant": variant, **figures}


def trained(variant: str, seed: int, *curve: float) -> dict[str, Any]:
    points = [{"step": k, "seconds": 10.0 * k, "metric": value, "loss": 0.0} for k, value in enumerate(curve, 1)]
    record = {"kind": "run", "variant": variant, "seed": seed, "metric": curve[-1], "curve": points}
    return {**record, "train_seconds": 10.0 * len(curve) + seed}


RECORDS = [
    cost("full", 1.0, 100),
    cost("removed", 0.6, 60),
    cost("light+channel", 0.7, 90),
    {"kind": "cost", "variant": "light+odd", "reason": "no such fusion"},
    trained("full", 0, 50.0, 80.0),
    trained("full", 1, 60.0, 84.0),
    trained("removed", 0, 40.0, 78.0),
    trained("removed", 1, 50.0, 79.0),
    trained("light+channel", 0, 81.0, 79.0),
    trained("light+channel", 1, 50.0, 70.0),
]


def test_rows_worked_out_by_hand() -> None:
    names = ["full", "removed", "light+channel", "light+odd"]
    full, removed, light, odd = rows_of(RECORDS, names, ACCURACY, None)
    assert full.over_full is None
    assert removed.over_removed is None
    assert removed.over_full.mean == -3.5  # of −2 and −5
    assert light.over_removed.mean == -4.0  # of 1 and −9
    assert light.deviation == pytest.approx(math.sqrt(40.5))
    assert light.eta_time == pytest.approx(0.75)
    assert light.eta_peak == pytest.approx(0.25)
    assert full.target == 80.0  # full's worst
    assert full.to_target == {0: 20.0, 1: 20.0}
    assert light.to_target == {0: 10.0, 1: None}
    assert light.seconds == {0: 20.0, 1: 21.0}
    assert odd.reason == "no such fusion"


def test_where_less_is_better_the_target_is_met_from_above() -> None:
    full, light = rows_of(RECORDS, ["full", "light+channel"], NATS, None)
    assert full.target == 84.0
    assert full.to_target == {0: 10.0, 1: 10.0}
    assert light.to_target == {0: 10.0, 1: 10.0}
    (given,) = rows_of(RECORDS, ["removed"], NATS, 45.0)
    assert given.to_target == {0: 10.0, 1: None}


@pytest.mark.parametrize(
    ("variant", "bound"),
    [
        ("block+scalar", "removed"),
        ("block+scalar:select=a,b:neighbour_gradient=0.5", "removed:select=a,b"),
        ("stacking:every=3:at=0.2", "removed:every=3"),
        ("rule2024", "removed:every=4"),
        ("same-time:as=light+channel:select=a", "removed"),
        ("full-time:of=light+channel:select=a", "removed:select=a"),
        ("removed:select=a", "removed:select=a"),
    ],
)
def test_the_bound_deletes_the_same_blocks(variant: str, bound: str) -> None:
    assert removed_like(variant) == bound


def test_recipes_are_changed_by_name() -> None:
    recipe = Recipe(10, 4, "sgd", 0.1)
    assert recipe.changed(["steps=5", "learning_rate=0.2"]) == replace(recipe, steps=5, learning_rate=0.2)
    with pytest.raises(ReplfxError, match="--set stps=5: there are steps"):
        recipe.changed(["stps=5"])
    with pytest.raises(ReplfxError, match="steps takes int, not '5x'"):
        recipe.changed(["steps=5x"])
    assert recipe.changed(["schedule=plateau"]) == replace(recipe, schedule="plateau")
    with pytest.raises(ReplfxError, match="schedule takes one-cycle or decay or plateau, not 'flat'"):
        recipe.changed(["schedule=flat"])


def test_the_plateau_is_as_high_as_long_as_it_says() -> None:
    recipe = Recipe(100, 4, "sgd", 0.5, "plateau")
    optimizer = recipe.optimizer_for(nn.Linear(1, 1))
    schedule = recipe.schedule_for(optimizer)
    rates = []
    for _ in range(recipe.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rising, level, falling = rates[:10], rates[10:80], rates[80:]
    assert rising == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert level == [0.5] * 70
    assert falling == pytest.approx([0.5 * (20 - step) / 20 for step in range(20)])


# ---- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command on a model of bytes that a test can wait for."""
    pytest.importorskip("matplotlib")
    for split in ("train", "valid", "test"):
        path = tmp_path / "data" / "wikitext2" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("all work and no play\n" * 30)
    model = {"small": partial(GPT, 256, 128, width=8, depth=4, heads=2)}
    task = replace(TASKS["wikitext2-bytes"], models=model)
    monkeypatch.setitem(TASKS, "wikitext2-bytes", task)
    changes = ("--set", "steps=4", "--set", "evaluations=2", "--set", "batch=2")

    def call(*options: str) -> dict[str, Any]:
        places = ("--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--repeats", "2")
        assert command.run(parsed(command, "--task", "wikitext2-bytes", *changes, *places, *options)) == 0
        (written,) = (tmp_path / "out").glob("*.json")
        return json.loads(written.read_text())

    return call


TIMED = ("same-time:as=removed", "full-time:of=stacking:at=0.25")


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_and_reports(run: Any, tmp_path: Path) -> None:
    variants = ("--variants", "removed", "block+scalar", "light+nothing", *TIMED, "--seeds", "0,1")
    lines = tmp_path / "out" / "accuracy.jsonl"
    first = run(*variants, "--runs", "1")
    assert sum(record["kind"] == "run" for record in first["records"]) == 1
    done = lines.read_text()
    found = run(*variants)
    assert lines.read_text().startswith(done)  # nothing was done again
    runs = {(r["variant"], r["seed"]): r for r in found["records"] if r["kind"] == "run"}
    names = ("full", "removed", "block+scalar", "stacking:at=0.25", *TIMED)
    assert set(runs) == {(name, seed) for name in names for seed in (0, 1)}
    for record in runs.values():
        assert {"threads", "device", "torch", "commit"} <= record["environment"].keys()
        assert record["peak_training_bytes"] > 0
        assert len(record["curve"]) == 2
        assert record["curve"][-1]["metric"] == record["metric"]
    ratios = {r["variant"]: r["step_over_full"]["median"] for r in found["records"] if "step_over_full" in r}
    shares = (ratios["removed"], 1 / (0.25 * ratios["stacking:at=0.25"] + 0.75))
    for name, share in zip(TIMED, shares, strict=True):
        assert runs[name, 0]["recipe"]["steps"] == max(1, round(4 * share))
    text = next((tmp_path / "out").glob("*.md")).read_text()
    assert "| light+nothing | n/a: unknown fusion 'nothing'" in text
    assert next((tmp_path / "out").glob("*.png")).stat().st_size > 1000
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []
    assert run(*variants, "--report") == found


def test_time_that_is_up_leaves_a_checkpoint(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ReplfxError, match="no finished run"):
        run("--max-minutes", "0", "--variants", "full", "--seeds", "0")
    assert len(run("--variants", "full", "--seeds", "0")["records"]) == 2


def test_a_folder_has_to_be_named(tmp_path: Path) -> None:
    words = ("--task", "turns", "--out", str(tmp_path))
    with pytest.raises(ReplfxError, match="--data-root"):
        command.run(parsed(command, *words))
    with pytest.raises(ReplfxError, match="there is no such folder"):
        command.run(parsed(command, *words, "--data-root", str(tmp_path / "none")))
