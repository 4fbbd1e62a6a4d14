"""The accuracy benchmark's loaders on small files in each layout, and its batches."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy import images, text
from benchmarks.accuracy.tasks import TASKS, subject_of
from replfx import ReplfxError
from replfx.demo import text as demo_text
from tests.benchmarks.accuracy import pictures, toys

SPLITS = ("train", "valid", "test")
SPLIT_SIZES = (("train", 4), ("test", 3))


def test_both_layouts_of_cifar10_give_the_same_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    pixels = {split: rng.integers(256, size=(10, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")}
    for split, each in pixels.items():
        for label, one in enumerate(each):
            folder = tmp_path / "folders" / "cifar10" / split / f"class{label}"
            folder.mkdir(parents=True)
            image.fromarray(one).save(folder / "0.png")
    batches = tmp_path / "pickles" / "cifar-10-batches-py"
    batches.mkdir(parents=True)

    def write(name: str, chosen: np.ndarray, labels: list[int]) -> None:
        data = chosen.transpose(0, 3, 1, 2).reshape(len(chosen), -1)
        (batches / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}))

    for number in range(5):
        write(f"data_batch_{number + 1}", pixels["train"][2 * number : 2 * number + 2], [2 * number, 2 * number + 1])
    write("test_batch", pixels["test"], list(range(10)))

    one, other = (images.cifar10(tmp_path / name) for name in ("folders", "pickles"))
    for name in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.train.dtype == torch.uint8
    assert torch.equal(one.train, torch.from_numpy(pixels["train"]).permute(0, 3, 1, 2))
    assert one.test_labels.tolist() == list(range(10))


def test_fashion_mnist_is_read_as_published(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = {"train": rng.integers(256, size=(5, 28, 28)), "t10k": rng.integers(256, size=(3, 28, 28))}
    for split, each in pixels.items():
        head = struct.pack(">IIII", 2051, *each.shape)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + each.astype(np.uint8).tobytes())
        labels = np.arange(len(each), dtype=np.uint8)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(each)) + labels.tobytes())
    found = images.fashion_mnist(tmp_path)
    assert found.train.shape == (5, 1, 28, 28)
    assert torch.equal(found.train[:, 0].long(), torch.from_numpy(pixels["train"]))
    assert torch.equal(found.test[:, 0].long(), torch.from_numpy(pixels["t10k"]))
    assert found.train_labels.tolist() == [0, 1, 2, 3, 4]


def test_svhn_is_read_as_published(tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    rng = np.random.default_rng(0)
    pixels = {split: rng.integers(256, size=(32, 32, 3, count), dtype=np.uint8) for split, count in SPLIT_SIZES}
    labels = {split: rng.integers(1, 11, size=(count, 1), dtype=np.uint8) for split, count in SPLIT_SIZES}
    labels["train"][0] = 10
    (tmp_path / "svhn").mkdir()
    for split in ("train", "test"):
        savemat(tmp_path / "svhn" / f"{split}_32x32.mat", {"X": pixels[split], "y": labels[split]})
    found = images.svhn(tmp_path)
    assert found.train.shape == (4, 3, 32, 32)
    assert found.train[1, 2, 3, 4] == pixels["train"][3, 4, 2, 1]
    assert torch.equal(found.test[2, 0], torch.from_numpy(pixels["test"][:, :, 0, 2]))
    assert found.train_labels[0] == 0  # the digit 0
    assert found.train_labels.tolist() == [int(label) % 10 for label in labels["train"][:, 0]]
    x, _ = found.batch(0, 0, 4)  # digits stay as they are: in their order, the very pixels
    assert {one.numpy().tobytes() for one in x.contiguous()} == {
        one.numpy().tobytes() for one in found.normalised(found.train)
    }


def test_stl10_is_read_as_published(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = {split: rng.integers(256, size=(count, 3, 96, 96), dtype=np.uint8) for split, count in SPLIT_SIZES}
    for split, each in pixels.items():
        # Written pixel by pixel as its page says: channel after channel, each column by column.
        (folder / f"{split}_X.bin").write_bytes(b"".join(np.asfortranarray(c).tobytes("F") for i in each for c in i))
        (folder / f"{split}_y.bin").write_bytes(bytes(range(1, len(each) + 1)))
    found = images.stl10(tmp_path)
    assert torch.equal(found.train, torch.from_numpy(pixels["train"]))
    assert torch.equal(found.test, torch.from_numpy(pixels["test"]))
    assert found.train_labels.tolist() == [0, 1, 2, 3]
    (folder / "test_y.bin").write_bytes(b"\1")
    with pytest.raises(ReplfxError, match="are not 1 images"):
        images.stl10(tmp_path)


TEXTS = {"train": "\n = A =\n\n b a b .\n", "valid": " a c\n", "test": " <unk> b\n"}


@pytest.mark.parametrize("pattern", ["wikitext2/{}.txt", "wikitext-2/wiki.{}.tokens"])
def test_wikitext_as_words_and_as_bytes(tmp_path: Path, pattern: str) -> None:
    for split, content in TEXTS.items():
        path = tmp_path / pattern.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    words = text.wikitext2(tmp_path)
    # In the order of appearance: <eos> = A b a . c <unk>
    assert words.train.tolist() == [0, 1, 2, 1, 0, 0, 3, 4, 3, 5, 0]
    assert words.valid.tolist() == [4, 6, 0]
    assert words.test.tolist() == [7, 3, 0]
    assert words.vocabulary == 8
    raw = text.wikitext2_bytes(tmp_path)
    assert bytes(raw.train.tolist()).decode() == TEXTS["train"]


def test_python_sources_are_split_as_in_the_demo(tmp_path: Path) -> None:
    sources, found = demo_text.load(None), text.python_bytes(tmp_path)
    assert torch.equal(found.train, sources.train)
    assert torch.equal(found.valid, sources.held_out)


ON_DISK = {task.load for task in TASKS.values()} - {text.python_bytes}


@pytest.mark.parametrize("load", sorted(ON_DISK, key=lambda load: load.__name__))
def test_data_that_is_not_there_is_said_to_be(tmp_path: Path, load: Callable[[Path], object]) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ReplfxError, match=r"no [\w-]+ in "):
        load(tmp_path)


def test_a_budget_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ReplfxError, match="imagenet has no budget small: ask for --budget full"):
        subject_of("imagenet", "small", [], tmp_path, toys.CPU)


# ---- batches


@given(size=st.integers(1, 12), seed=st.integers(0, 5))
def test_a_pass_meets_each_image_once(size: int, seed: int) -> None:
    data = toys.images()
    marked = images.Images(data.train, torch.arange(len(data.train)), data.test, data.test_labels, augment=False)
    steps = len(data.train) // size
    met = torch.cat([marked.batch(seed, step, size)[1] for step in range(steps)]).tolist()
    assert len(set(met)) == len(met) == steps * size
    again = torch.cat([marked.batch(seed, step, size)[1] for step in range(steps, 2 * steps)]).tolist()
    assert len(set(again)) == len(again)


def test_images_are_normalised_and_a_batch_depends_on_its_place_alone() -> None:
    data = toys.images()
    pixels = data.train.double()
    expected = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(data.normalised(data.train), expected.float(), rtol=1e-5, atol=1e-5)
    pictures.assert_depends_on_its_place_alone(data, 4)
    assert not torch.equal(data.batch(1, 7, 4)[0], data.batch(2, 7, 4)[0])


def test_too_little_data_for_a_batch_is_refused() -> None:
    with pytest.raises(ReplfxError, match="24 training images do not fill one batch of 25"):
        toys.images().batch(0, 0, 25)
    with pytest.raises(ReplfxError, match="no window of 8"):
        toys.text(8).batch(0, 0, 1)


def test_a_part_of_the_data_is_the_same_each_time_and_of_all_images() -> None:
    data = toys.images()
    marked = images.Images(data.train, torch.arange(len(data.train)), data.test, data.test_labels)
    part = marked.part(10)
    assert torch.equal(part.train, data.train[part.train_labels])
    assert len(set(part.train_labels.tolist())) == 10
    assert max(part.train_labels) > 10
    assert torch.equal(part.train_labels, marked.part(10).train_labels)
    assert torch.equal(part.test, data.test)
    words = toys.text()
    assert torch.equal(words.part(5).train, words.train[:41])
    assert words.part(5).examples == 5


def test_only_images_and_texts_have_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = toys.fcn()
    monkeypatch.setitem(TASKS, "scenes", replace(scenes.task, load=lambda root: scenes.data))
    with pytest.raises(ReplfxError, match="scenes: --set examples= is for images and texts"):
        subject_of("scenes", "small", ["examples=5"], Path(), toys.CPU)


def test_windows_of_text_and_what_follows() -> None:
    counting = torch.arange(50, dtype=torch.uint8)
    data = text.Text(counting, counting, counting, vocabulary=50, context=8)
    inputs, targets = data.batch(0, 0, 64)
    assert inputs.shape == targets.shape == (64, 8)
    assert torch.equal(inputs + 1, targets)
    assert {0, 41} <= set(inputs[:, 0].tolist()) | {0, 41}
    assert int(targets.max()) <= 49


def test_the_loss_of_a_text_is_taken_on_windows_that_do_not_overlap() -> None:
    data = toys.text()
    logits = torch.randn(17, 17, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Embedding.from_pretrained(logits)  # a bigram model: the logits depend on one token
    kept = data.valid.long()[: (len(data.valid) - 1) // 8 * 8 + 1]
    expected = torch.nn.functional.cross_entropy(logits[kept[:-1]].double(), kept[1:])
    assert data.metric(model, final=True) == pytest.approx(float(expected), rel=1e-6)
