"""All models of all registries, each in a process of its own: an hour and more (run them with -m zoo)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(0)]


@pytest.mark.parametrize("source", ["timm", "torchvision", "transformers"])
def test_every_model_is_replaced_or_refused_with_a_reason(source: str, tmp_path: Path) -> None:
    pytest.importorskip(source)
    assert main(["zoo", "--source", source, "--no-peers", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "zoo.json").read_text())["results"]
    assert records
    failures = [f"{r['name']}: {r['stage']}: {r['error']}" for r in records if r["status"] == "failure"]
    assert not failures, "\n".join(failures)
