"""Drawings: well-formed, each block where it belongs, arcs from both neighbours."""

import re
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import replfx
from replfx.reports.report import BlockReport, Report
from tests.support.models import tower

SVG = "{http://www.w3.org/2000/svg}"


def chain(length: int, every: int = 2, name: str = "blocks", index: int = 0) -> list[BlockReport]:
    """Blocks 1, 1 + every, … replaced."""
    blocks = []
    for i in range(length):
        replaced = i % every == 1 and i + 1 < length
        sides = {"previous": f"{name}.{i - 1}", "next": f"{name}.{i + 1}", "operator": "block", "fusion": "scalar"}
        blocks.append(BlockReport(f"{name}.{i}", index, 1000, **(sides if replaced else {})))
    return blocks


def report_of(*chains: list[BlockReport]) -> Report:
    return Report(
        "Model", chains=[[b.path for b in blocks] for blocks in chains], blocks=[b for c in chains for b in c]
    )


def boxes(svg: str) -> list[tuple[str, bool, float, float]]:
    """Each block that is drawn: its path, whether it is a repetition, and where it begins."""
    found = []
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        x, y = float(rect.attrib["x"]), float(rect.attrib["y"])
        found.append((title.text.partition(":")[0], group.attrib["opacity"] != "1", x, y))
    return found


def arcs(svg: str) -> list[tuple[float, float, float]]:
    """Where each arc begins and ends, and how high."""
    paths = (path.attrib for path in ElementTree.fromstring(svg).iter(f"{SVG}path"))
    shapes = [path["d"] for path in paths if path.get("marker-end") == "url(#reads)"]
    numbers = [list(map(float, re.findall(r"[-\d.]+", shape))) for shape in shapes]
    return [(n[0], n[-2], n[1]) for n in numbers][1:]  # the first is the legend's


@pytest.mark.parametrize("length", [3, 12, 13, 14, 100])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_each_block_once_and_each_arc_between_the_blocks_it_means(length, every):
    report = report_of(chain(length, every))
    svg = str(replfx.draw(report))
    drawn = boxes(svg)
    assert [path for path, again, _, _ in drawn if not again] == [block.path for block in report.blocks]
    places: dict[tuple[float, str], float] = {(y, path): x for path, _, x, y in drawn}
    width = 76.0

    def at(x: float, top: float) -> str:
        return next(path for (y, path), left in places.items() if left < x < left + width and 0 < y - top < 5)

    read = sorted((at(start, top), at(stop, top)) for start, stop, top in arcs(svg))
    assert read == sorted((str(s), b.path) for b in report.blocks for s in (b.previous, b.next) if s is not None)


def test_nothing_is_drawn_outside_of_the_picture():
    root = ElementTree.fromstring(replfx.draw(report_of(chain(100), chain(30, 3, "decoder.layers", 1))))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        if "x" in rect.attrib:
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
            assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height
    assert all(float(text.attrib["y"]) < height for text in root.iter(f"{SVG}text"))


def test_a_model_with_reasons_and_signs_that_xml_knows(tmp_path):
    model = tower(length=7)
    model.blocks[3].requires_grad_(False)
    report = replfx.inspect(model, torch.rand(2, 4), fraction=0.4)
    report.notes.append('a < b & "c"')
    file = tmp_path / "model.svg"
    svg = replfx.draw(report, file)
    assert file.read_text(encoding="utf-8") == svg == svg._repr_svg_()
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "Tower: 2 of 7 blocks replaced" in texts
    assert 'a < b & "c"' in texts
    assert any("all its parameters are frozen" in str(text) for text in texts)


def test_transformed_and_applied_models_are_drawn_alike():
    model = tower()
    made = replfx.transform(model)
    applied = replfx.apply(model, replfx.plan_of(made))
    for each in (made, applied):
        drawn = boxes(str(replfx.draw(each)))
        assert [path for path, *_ in drawn] == [f"blocks.{i}" for i in range(5)]
    assert len(arcs(str(replfx.draw(applied)))) == 4


def test_an_untransformed_model_and_a_model_without_chains():
    with pytest.raises(replfx.PlanError, match="not a transformed model"):
        replfx.draw(tower())
    svg = replfx.draw(replfx.inspect(nn.Linear(3, 3)))
    assert "Linear: 0 of 0 blocks replaced" in svg
