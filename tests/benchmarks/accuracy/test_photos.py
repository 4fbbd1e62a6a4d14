"""ImageNet's loader on small files, and what is seen of a photograph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.accuracy import photos
from benchmarks.accuracy.photos import Photos
from replfx import ReplfxError
from tests.benchmarks.accuracy import pictures

pytest.importorskip("torchvision")
image_module = pytest.importorskip("PIL.Image")


def one_colour(value: int) -> torch.Tensor:
    """What a model sees of a picture whose bytes all are `value`: (3,)."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (value / 255 - mean) / deviation


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Two classes; each picture has one colour, by which it can be told from the others."""
    for split, count in (("train", 4), ("val", 3)):
        for label, name in enumerate(("n01440764", "n01443537")):
            for k in range(count):
                colour = pictures.drawn(0, 20 + k, 30) * 0 + 100 * label + 10 * k
                pictures.write(tmp_path / "imagenet" / split / name / f"{name}_{k}.JPEG", colour)
    return tmp_path


def test_imagenet_is_read_as_torchvision_leaves_it(imagenet: Path) -> None:
    data = photos.imagenet(imagenet)
    assert (len(data.train), len(data.test)) == (8, 6)
    small = Photos(data.train, data.test, size=16)
    met = []
    for step in range(2):
        x, y = small.batch(3, step, 4)
        assert x.shape == (4, 3, 16, 16)
        for image, label in zip(x, y.tolist(), strict=True):
            value = 100 * label + 10 * next(
                k for k in range(4) if torch.allclose(image[:, 0, 0], one_colour(100 * label + 10 * k))
            )
            torch.testing.assert_close(image, one_colour(value).view(3, 1, 1).expand(3, 16, 16))
            met.append(value)
    assert sorted(met) == [0, 10, 20, 30, 100, 110, 120, 130]


def test_a_batch_depends_on_its_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [(image_module.fromarray(pictures.drawn(k, 40, 50)), k) for k in range(6)]
    data = Photos(noise, noise, size=12)
    batch = data.batch(1, 7, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(data.batch(1, 7, 3), batch, rtol=0, atol=0)
    pictures.assert_depends_on_its_place_alone(data)
    # The next pass shows other parts of the same photographs.
    assert not torch.equal(data.batch(1, 0, 6)[0].sort(0).values, data.batch(1, 1, 6)[0].sort(0).values)


@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 99))
def test_parts_lie_inside_and_have_the_area_and_shape_asked_for(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = photos.random_box(width, height, torch.Generator().manual_seed(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    if 1 / 2 < width / height < 2 and min(width, height) > 60:
        # Each side is rounded by half a pixel at most.
        assert (w - 0.5) * (h - 0.5) <= width * height
        assert (w + 0.5) * (h + 0.5) >= 0.08 * width * height
        assert (w - 0.5) / (h + 0.5) <= 4 / 3
        assert (w + 0.5) / (h - 0.5) >= 3 / 4


def test_parts_come_in_all_sizes_and_places() -> None:
    boxes = [photos.random_box(100, 100, torch.Generator().manual_seed(k)) for k in range(400)]
    areas = [(r - left) * (b - top) / 1e4 for left, top, r, b in boxes]
    # The mean of a uniform area is 0.54; parts that stick out are drawn again, so that large ones are rarer.
    assert 0.4 < sum(areas) / len(areas) < 0.56
    assert min(areas) < 0.12
    assert max(areas) > 0.9
    assert min(left for left, *_ in boxes) == 0
    assert max(left for left, *_ in boxes) > 50


@settings(max_examples=20)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_the_test_sees_the_middle(width: int, height: int) -> None:
    left, top, right, bottom = photos.middle_box(width, height)
    assert right - left == bottom - top == max(1, round(0.875 * min(width, height)))
    assert abs((left + right) - width) <= 1
    assert abs((top + bottom) - height) <= 1


class ByColour(nn.Module):
    """Says 1 of what is bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (x.mean((1, 2, 3)) > one_colour(115).mean()).long()
        return nn.functional.one_hot(bright, 2).float()


def test_the_accuracy_is_of_all_test_photographs(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "EVALUATED", 4)  # 4 + 2
    data = photos.imagenet(imagenet)
    # Of 0, 10, 20 and 100, 110, 120 the last alone is brighter than 115: four of six are right.
    assert data.metric(ByColour(), final=True) == pytest.approx(100 * 4 / 6)


def test_what_does_not_fit_is_refused(imagenet: Path) -> None:
    with pytest.raises(ReplfxError, match="8 training images do not fill one batch of 9"):
        photos.imagenet(imagenet).batch(0, 0, 9)
    (imagenet / "imagenet" / "train" / "n01440764" / "n01440764_0.JPEG").write_bytes(b"no picture")
    with pytest.raises(ReplfxError, match="is missing or no picture"):
        photos.imagenet(imagenet).batch(0, 0, 8)
    pictures.write(imagenet / "imagenet" / "val" / "n02" / "0.JPEG", pictures.drawn(0, 4, 4))
    with pytest.raises(ReplfxError, match="the same class folders"):
        photos.imagenet(imagenet)
