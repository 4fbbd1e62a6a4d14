"""BCCD's and COCO's loaders on small files, boxes in mirrored pictures, and the mean average precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.accuracy import boxes
from benchmarks.accuracy.boxes import Detections, Example, Things
from replfx import ReplfxError
from tests.benchmarks.accuracy import pictures

pytest.importorskip("PIL")

# ---- BCCD


def voc(*things: tuple[str, int, int, int, int]) -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, left, top, right, bottom in things
    )
    return f"<annotation><size><width>20</width><height>10</height></size>{objects}</annotation>"


ANNOTATIONS = {
    "one": voc(("WBC", 1, 1, 20, 10), ("RBC", 3, 4, 7, 9)),
    "two": voc(("Platelets", 0, 0, 25, 12), ("RBC", 5, 5, 4, 9)),  # sticks out; has no area
    "none": voc(),
    "tested": voc(("RBC", 2, 2, 3, 3)),
}


@pytest.fixture
def bccd(tmp_path: Path) -> Path:
    folder = tmp_path / "bccd" / "BCCD"
    for k, (name, text) in enumerate(ANNOTATIONS.items()):
        pictures.write(folder / "JPEGImages" / f"{name}.jpg", pictures.drawn(k, 10, 20))
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "trainval.txt").write_text("one\ntwo\nnone\n")
    (sets / "test.txt").write_text("tested\n")
    return tmp_path


def test_bccd_is_read_as_pascal_voc_has_it(bccd: Path) -> None:
    data = boxes.bccd(bccd)
    assert (len(data.train), len(data.test)) == (2, 1)  # of nothing there is nothing to learn
    image, things = data.train[0]
    assert torch.equal(image, torch.from_numpy(pictures.drawn(0, 10, 20)).permute(2, 0, 1))
    # Its pixels count from 1: the whole picture is from 1 to 20.
    assert things.boxes.tolist() == [[0, 0, 20, 10], [2, 3, 7, 9]]
    assert things.labels.tolist() == [2, 1]
    _, things = data.train[1]
    assert things.boxes.tolist() == [[0, 0, 20, 10]]
    assert things.labels.tolist() == [3]
    assert data.test[0][1].boxes.tolist() == [[1, 1, 3, 3]]


def test_annotations_that_do_not_fit_are_refused(bccd: Path) -> None:
    path = bccd / "bccd" / "BCCD" / "Annotations" / "two.xml"
    path.write_text(voc(("Cat", 1, 1, 2, 2)))
    with pytest.raises(ReplfxError, match=r"two\.xml has a 'Cat'; there are RBC, WBC, Platelets"):
        boxes.bccd(bccd)
    path.unlink()
    with pytest.raises(ReplfxError, match=r"two\.xml is missing"):
        boxes.bccd(bccd)


# ---- COCO


def annotation(number: int, image: int, label: int, box: list[float], crowd: int = 0) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": label,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": crowd,
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder = tmp_path / "coco"
    found = [
        annotation(1, 7, 90, [1, 2, 5, 4]),
        annotation(2, 7, 3, [0, 0, 20, 10], crowd=1),
        annotation(3, 9, 3, [0, 0, 20, 10], crowd=1),
        annotation(4, 8, 1, [3, 3, 0, 4]),
        annotation(5, 5, 1, [2.5, 3, 4, 4]),
    ]
    for split in ("train2017", "val2017"):
        images = [{"id": k, "file_name": f"{k:012d}.jpg", "width": 20, "height": 10} for k in (9, 7, 8, 5)]
        for image in images:
            pictures.write(folder / split / str(image["file_name"]), pictures.drawn(int(str(image["id"])), 10, 20))
        (folder / "annotations").mkdir(exist_ok=True)
        document = {
            "images": images,
            "annotations": found,
            "categories": [{"id": k, "name": str(k)} for k in (1, 3, 90)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return tmp_path


def test_coco_is_read_from_disk(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocotools")
    data = boxes.coco(coco)
    assert capsys.readouterr().out == ""
    # 8's box has no area, 9 has a crowd alone; the metric is taken on all.
    assert (len(data.train), len(data.test)) == (2, 4)
    image, things = data.train[1]
    assert torch.equal(image, torch.from_numpy(pictures.drawn(7, 10, 20)).permute(2, 0, 1))
    assert things.boxes.tolist() == [[1, 2, 6, 6], [0, 0, 20, 10]]
    assert things.labels.tolist() == [90, 3]
    assert things.crowd.tolist() == [0, 1]
    _, targets = data.batch(0, 0, 2)
    assert sorted(target["labels"].tolist() for target in targets) == [[1], [90]]


# ---- batches


def thing(*box: float, label: int = 1, crowd: int = 0) -> tuple[tuple[float, float, float, float], int, int]:
    left, top, right, bottom = box
    return (left, top, right, bottom), label, crowd


def example(seed: int, *things: tuple[tuple[float, float, float, float], int, int]) -> Example:
    """A black picture in which the first thing's box is white."""
    image = torch.zeros(3, 10, 20, dtype=torch.uint8)
    left, top, right, bottom = (int(side) for side in things[0][0])
    image[:, top:bottom, left:right] = 255
    return image, Things.of(things)


def bounds(image: Tensor) -> list[float]:
    rows, columns = (image[0] > 0).nonzero().unbind(1)
    return [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@given(
    left=st.integers(0, 18),
    width=st.integers(1, 20),
    top=st.integers(0, 8),
    height=st.integers(1, 10),
    step=st.integers(0, 20),
)
def test_boxes_stay_around_their_things_when_pictures_are_mirrored(
    left: int, width: int, top: int, height: int, step: int
) -> None:
    box = (left, top, min(20, left + width), min(10, top + height))
    data = Detections([example(0, thing(*box), thing(0, 0, 20, 10, label=2, crowd=1))], [])
    (image,), (targets,) = data.batch(0, step, 1)
    assert targets["boxes"].tolist() == [bounds(image)]
    assert targets["labels"].tolist() == [1]  # crowds are not trained on
    assert image.min() >= 0
    assert image.max() == 1


def test_a_batch_depends_on_its_place_alone_and_mirrors_half() -> None:
    data = Detections([example(k, thing(k, 0, k + 2, 5)) for k in range(6)], [])
    pictures.assert_depends_on_its_place_alone(data)
    kept = sum(int(float(t["boxes"][0, 0]) < 8) for step in range(100) for t in data.batch(0, step, 6)[1])
    assert abs(kept - 300) < 5 * (600 / 4) ** 0.5
    with pytest.raises(ReplfxError, match="6 training images do not fill one batch of 7"):
        data.batch(0, 0, 7)


# ---- loss and metric


class Recites(nn.Module):
    """Gives what it was told to, picture by picture; in training its losses."""

    def __init__(self, answers: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, images: list[Tensor], targets: object = None) -> Any:
        if targets is not None:
            return {"one": torch.tensor(0.25), "other": torch.tensor(2.0)}
        return [self.answers.pop(0) for _ in images]


def test_the_loss_is_the_sum_of_a_detectors_losses() -> None:
    data = Detections([example(0, thing(0, 0, 5, 5))], [])
    assert float(data.loss(Recites([]), data.batch(0, 0, 1))) == 2.25


def answer(score: float, *box: float, label: int = 1) -> dict[str, Tensor]:
    return {"boxes": torch.tensor([box]), "scores": torch.tensor([score]), "labels": torch.tensor([label])}


def test_the_mean_average_precision_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(boxes, "EVALUATED", 2)  # 2 + 1
    test = [
        example(0, thing(0, 0, 10, 10), thing(10, 0, 20, 10, crowd=1)),
        example(1, thing(0, 0, 10, 10)),
        example(2, thing(0, 0, 8, 8, label=2)),
    ]
    answers = [
        answer(0.9, 0.0, 0.0, 10.0, 8.2),  # overlaps by 0.82: right at 0.5, 0.55, … 0.8
        answer(0.8, 0.0, 0.0, 10.0, 10.0),
        answer(0.7, 0.0, 0.0, 8.0, 8.0, label=2),
    ]
    answers[0] = {
        name: torch.cat([value, answer(0.95, 11.0, 0.0, 19.0, 9.0)[name]]) for name, value in answers[0].items()
    }
    found = Detections([], test).metric(Recites(answers), final=True)
    # Class 2 is found at all ten overlaps, and class 1 at seven, where the crowd's detection does not count. At the
    # other three the first is wrong and the second right: a precision of 1/2 up to a recall of 1/2, which 51 of the
    # 101 recalls that COCO looks at are at most.
    assert found == pytest.approx(100 * (1 + (7 + 3 * 0.5 * 51 / 101) / 10) / 2, rel=1e-6)
