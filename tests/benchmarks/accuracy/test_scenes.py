"""CamVid's and CityScapes' loaders on small files, what is seen of a scene, and the mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import scenes
from benchmarks.accuracy.scenes import IGNORED, Scene, Scenes, random_part
from replfx import ReplfxError
from tests.benchmarks.accuracy import pictures

pytest.importorskip("torchvision")
pytest.importorskip("PIL")


def labels(seed: int, height: int, width: int, highest: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(highest + 1, size=(height, width), dtype=np.uint8)


# ---- loaders


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for k in range(count):
            folder = tmp_path / "camvid" / split
            pictures.write(folder / "images" / f"{split}{k}.jpg", pictures.drawn(k, 6, 8))
            pictures.write(folder / "masks" / f"{split}{k}.png", labels(k, 6, 8, 11))
    return tmp_path


def test_camvid_is_read_and_its_label_11_ignored(camvid: Path) -> None:
    data = scenes.camvid(camvid)
    assert (len(data.train), len(data.test), data.classes) == (3, 2, 11)
    image, classes = data.train[2]
    assert torch.equal(image, torch.from_numpy(pictures.drawn(2, 6, 8)).permute(2, 0, 1))
    mask = torch.from_numpy(labels(2, 6, 8, 11))
    assert (mask == 11).any()
    assert torch.equal(classes == IGNORED, mask == 11)
    assert torch.equal(classes[mask < 11], mask[mask < 11])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "has no mask of train1"),
        (lambda path: pictures.write(path, pictures.drawn(0, 6, 8)), r"is uint8 \(6, 8, 3\), not a byte"),
        (lambda path: pictures.write(path, labels(0, 6, 9, 11)), r"is uint8 \(6, 9\), not a byte for each of \(6, 8\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(camvid: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(camvid / "camvid" / "train" / "masks" / "train1.png")
    with pytest.raises(ReplfxError, match=message):
        scenes.camvid(camvid)


# From the page of the data set: the id of a label in gtFine_labelIds.png → what is trained on, all others ignored.
TRAINED = dict(zip([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], range(19), strict=True))


def test_cityscapes_is_read_from_disk_in_the_order_of_names(tmp_path: Path) -> None:
    root = tmp_path / "cityscapes"
    names = ["aachen_000001_000019", "aachen_000000_000019", "bochum_000000_000313"]
    for split, chosen in (("train", names), ("val", names[:1])):
        for k, name in enumerate(chosen):
            city = name.partition("_")[0]
            pictures.write(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", pictures.drawn(k, 8, 16))
            pictures.write(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", labels(k, 8, 16, 33))
    data = scenes.cityscapes(tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (3, 1, 19)
    for place, k in enumerate((1, 0, 2)):
        image, classes = data.train[place]
        assert torch.equal(image, torch.from_numpy(pictures.drawn(k, 8, 16)).permute(2, 0, 1))
        expected = [[TRAINED.get(label, IGNORED) for label in row] for row in labels(k, 8, 16, 33).tolist()]
        assert classes.tolist() == expected
    x, y = data.batch(0, 0, 2)
    assert x.shape == (2, 3, 512, 1024)
    assert y.shape == (2, 512, 1024)


# ---- batches


def ramp(height: int, width: int) -> Scene:
    """A scene whose pixels say where they are: red counts rows, green columns, and the class is both."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([8 * rows, 8 * columns, 0 * rows]).to(torch.uint8)
    return picture, (rows * width + columns).to(torch.uint8)


@given(seed=st.integers(0, 200), crop=st.tuples(st.integers(1, 12), st.integers(1, 16)))
def test_a_part_of_a_scene_keeps_pixels_and_classes_together(seed: int, crop: tuple[int, int]) -> None:
    picture, classes = random_part(ramp(8, 12), crop, (1.0, 1.0), torch.Generator().manual_seed(seed))
    assert picture.shape == (3, *crop)
    assert classes.shape == crop
    seen = classes != IGNORED
    # As much as there is of it, and the rest is black.
    assert int(seen.sum()) == min(crop[0], 8) * min(crop[1], 12)
    assert not picture[:, ~seen].any()
    assert torch.equal((picture[0] // 8 * 12 + picture[1] // 8)[seen], classes[seen])


def test_parts_are_mirrored_or_not_and_scaled() -> None:
    ways = set()
    for seed in range(20):
        picture, _ = random_part(ramp(8, 12), (4, 4), (1.0, 1.0), torch.Generator().manual_seed(seed))
        ways.add(bool(picture[1, 0, 0] > picture[1, 0, 3]))
    assert ways == {True, False}
    _, classes = random_part(ramp(8, 12), (16, 24), (2.0, 2.0), torch.Generator().manual_seed(0))
    if classes[0, 0] > classes[0, -1]:
        classes = classes.flip(1)
    assert torch.equal(classes, ramp(8, 12)[1].repeat_interleave(2, 0).repeat_interleave(2, 1))


def noise() -> Scenes:
    def scene(seed: int) -> Scene:
        picture = torch.from_numpy(pictures.drawn(seed, 10, 14)).permute(2, 0, 1)
        return picture, torch.from_numpy(labels(seed, 10, 14, 3))

    return Scenes([scene(k) for k in range(5)], [scene(9)], 4, crop=(8, 8), scales=(0.5, 2.0))


def test_a_batch_depends_on_its_place_alone() -> None:
    data = noise()
    pictures.assert_depends_on_its_place_alone(data)
    assert not torch.equal(data.batch(1, 7, 3)[0], data.batch(2, 7, 3)[0])
    with pytest.raises(ReplfxError, match="5 training images do not fill one batch of 6"):
        data.batch(0, 0, 6)


# ---- loss and metric


class Recites(nn.Module):
    """Says of each picture the classes that it is given, one picture a call."""

    def __init__(self, answers: list[Tensor], classes: int) -> None:
        super().__init__()
        self.answers, self.classes = list(answers), classes

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": F.one_hot(self.answers.pop(0)[None].long(), self.classes).permute(0, 3, 1, 2).float()}


def test_the_mean_intersection_over_union_by_hand() -> None:
    pytest.importorskip("torchmetrics")
    blank = torch.zeros(3, 2, 3, dtype=torch.uint8)
    truths = [[[0, 0, 1], [1, 1, IGNORED]], [[0, 2, 2], [IGNORED, IGNORED, IGNORED]]]
    answers = [[[0, 1, 1], [1, 2, 0]], [[0, 2, 0], [1, 1, 2]]]
    test = [(blank, torch.tensor(truth, dtype=torch.uint8)) for truth in truths]
    data = Scenes(test, test, 3, crop=(2, 3), scales=(1.0, 1.0))
    # Of class 0 two are hit, one is missed, one is said wrongly: 2/4. Of class 1: 2 of 4. Of class 2: 1 of 3.
    found = data.metric(Recites([torch.tensor(answer) for answer in answers], 3), final=True)
    assert found == pytest.approx(100 * (2 / 4 + 2 / 4 + 1 / 3) / 3)


@given(seed=st.integers(0, 1000))
def test_the_mean_intersection_over_union_is_that_of_sets(seed: int) -> None:
    pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(seed)
    truth, answer = rng.integers(5, size=(2, 3, 6, 7))
    classes = (torch.from_numpy(np.where(t == 4, IGNORED, t).astype(np.uint8)) for t in truth)
    test = [(torch.zeros(3, 6, 7, dtype=torch.uint8), each) for each in classes]
    data = Scenes([], test, 4, (2, 2), (1.0, 1.0))
    said = np.minimum(answer, 3)
    shares = []
    for label in range(4):
        of_truth, of_answer = (truth == label), (said == label) & (truth != 4)
        shares.append((of_truth & of_answer).sum() / (of_truth | of_answer).sum())
    found = data.metric(Recites([torch.from_numpy(each) for each in said], 4), final=True)
    assert found == pytest.approx(100 * np.mean(shares), rel=1e-5)


def test_the_loss_ignores_what_has_no_class() -> None:
    data, model = noise(), nn.Conv2d(3, 4, 1)
    x, y = data.batch(0, 0, 2)
    y[:, :3] = IGNORED
    logits = model(x).detach().double()

    class Out(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": model(x)}

    kept = y != IGNORED
    chances = logits.softmax(1).permute(0, 2, 3, 1)[kept]
    expected = -chances[torch.arange(len(chances)), y[kept]].log().mean()
    torch.testing.assert_close(data.loss(Out(), (x, y)).double(), expected, rtol=1e-5, atol=1e-6)
