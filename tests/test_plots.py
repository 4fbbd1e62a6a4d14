"""Plots of the benchmarks: names that a reader understands, and drawing again from the files that are committed."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import names
from benchmarks.__main__ import main

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("full", "full depth"),
        ("block+scalar:unroll=0.2", "block, unrolled at 20 %"),
        ("light+channel:neighbour_gradient=0", "light · channel, neighbours get no gradient"),
        ("removed:every=4", "blocks removed, every 4th block"),
        ("block+scalar:select=layer1.2,layer2.2", "block, layer1.2, layer2.2"),
        (
            "block+scalar:unroll=0.2:lr=4e-3:after=0.5",
            "block, unrolled at 20 %, learning rate 0.004, rate × 0.5 once grown",
        ),
        ("same-time:as=stacking:at=0.6", "full depth in the time of: stacking, grown at 60 %"),
        ("full-time:of=removed", "in full's time: blocks removed"),
        ("block scalar_layer", "block · scalar_layer"),
        ("block scalar, once", "block · scalar, made once a step"),
        ("light materialized INT8", "light, materialized, INT8"),
        ("backend replfx", "replaced, replfx's backend"),
    ],
)
def test_variants_read_well(name: str, text: str) -> None:
    assert names.variant(name) == text


def test_subjects_read_well() -> None:
    told = names.subject("cifar10-resnet32/small,steps=6000")
    assert told == "A ResNet on CIFAR-10 (cifar10-resnet32, small budget, 6,000 steps)"
    assert names.setting({"device": "cpu", "every": 3}) == "CPU, every 3rd block replaced"


def test_no_committed_name_is_left_in_the_syntax_of_commands() -> None:
    files = [json.loads(file.read_text()) for file in RESULTS.glob("*.json") if file.stem != "zoo"]
    found = {row["variant"] for record in files for row in record.get("rows", [])}
    assert found
    assert not [
        name for name in found if set("=+:") & set(names.variant(name).replace("time of: ", "").replace("time: ", ""))
    ]


@pytest.mark.parametrize("stem", ["fashion-mnist-small", "step", "budget", "inference", "compile", "scale", "transfer"])
def test_every_kind_of_result_is_drawn_again(stem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(shutil.copy(RESULTS / f"{stem}.json", tmp_path))
    assert main(["redraw", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / stem}.png\n"
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_has_no_plot_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["redraw", str(RESULTS / "zoo.json")]) == 2
    assert "is no result that has a plot" in capsys.readouterr().err
