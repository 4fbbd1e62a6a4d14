"""The demo's data: scikit-learn's handwritten digits, or CIFAR-10 from a folder."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replfx import ReplfxError


@dataclass(frozen=True)
class Images:
    """A classification set in memory: normalised images (N, C, H, W) and labels (N,)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augment: bool
    """Whether training shifts and mirrors the images: photographs, not digits of eight pixels."""

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return int(self.train_labels.max()) + 1

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_images.shape[1]

    def to(self, device: torch.device) -> Images:
        """Move everything to a device."""
        return Images(
            self.name,
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
            self.augment,
        )

    @property
    def size(self) -> int:
        """Height and width of an image."""
        return self.train_images.shape[-1]

    def shortened(self, train: int, test: int) -> Images:
        """Keep some images only, drawn from all, since folders come class by class; for a quick run."""
        generator = torch.Generator().manual_seed(0)
        kept = torch.randperm(len(self.train_images), generator=generator)[:train]
        tested = torch.randperm(len(self.test_images), generator=generator)[:test]
        return Images(
            self.name,
            self.train_images[kept],
            self.train_labels[kept],
            self.test_images[tested],
            self.test_labels[tested],
            self.augment,
        )


def load(name: str, root: Path | None) -> Images:
    """Load a data set by name; all but the bundled digits are read from the folder ``root``."""
    if name == "digits":
        return _digits()
    if root is None:
        raise ReplfxError(f"--dataset {name} is read from a folder: name it with --data-root")
    return _cifar10(root)


def _digits() -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    split = train_test_split(
        bunch.images[:, None].astype(np.float32),
        bunch.target,
        test_size=0.3,
        random_state=0,
        stratify=bunch.target,
    )
    return _normalised("digits", *(torch.from_numpy(part) for part in split), augment=False)


def _cifar10(root: Path) -> Images:
    train, train_labels, test, test_labels = cifar10_pixels(root)
    return _normalised("cifar10", train, test, train_labels, test_labels, augment=True)


def cifar10_pixels(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read CIFAR-10 as image folders (cifar10/train/CLASS/*.png) or as the pickled batches it comes in.

    Returns:
        training images (N, 3, 32, 32) uint8 and labels (N,) int64, then the same of the test images.

    Raises:
        ReplfxError: `root` has neither.

    """
    folders, batches = root / "cifar10", root / "cifar-10-batches-py"
    if (folders / "train").is_dir() and (folders / "test").is_dir():
        train, test = _image_folder(folders / "train"), _image_folder(folders / "test")
    elif batches.is_dir():
        train = _pickled([batches / f"data_batch_{i}" for i in range(1, 6)])
        test = _pickled([batches / "test_batch"])
    else:
        raise ReplfxError(f"no CIFAR-10 in {root}: it has neither cifar10/train and cifar10/test nor {batches.name}")
    return (*train, *test)


def _image_folder(folder: Path) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(folder))
    pixels = np.stack([np.asarray(image.convert("RGB")) for image, _ in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets)


def _pickled(files: list[Path]) -> tuple[Tensor, Tensor]:
    # The published files are pickles; they are the user's own download, as torchvision reads them too.
    parts = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
    pixels = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([part[b"labels"] for part in parts])
    return torch.from_numpy(pixels), torch.from_numpy(labels).long()


def _normalised(
    name: str, train: Tensor, test: Tensor, train_labels: Tensor, test_labels: Tensor, *, augment: bool
) -> Images:
    """Shift and scale both parts by the training images' mean and deviation a channel."""
    train, test = train.float(), test.float()
    mean = train.mean(dim=(0, 2, 3), keepdim=True)
    deviation = train.std(dim=(0, 2, 3), keepdim=True)
    return Images(
        name,
        (train - mean) / deviation,
        train_labels.long(),
        (test - mean) / deviation,
        test_labels.long(),
        augment,
    )


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its width, and mirror half of them left to right."""
    count, _, size, _ = images.shape
    reach = size // 8
    padded = torch.nn.functional.pad(images, [reach] * 4)
    offsets = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    rows, columns = offsets + torch.arange(size)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count, device=images.device)[:, None, None]
    rows, columns = rows.to(images.device), columns.to(images.device)
    # Indices around a slice: the channels come out last.
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
