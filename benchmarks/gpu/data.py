"""What a GPU trains on: the machine's own Python sources, and CIFAR-10 carried in one small file."""

from __future__ import annotations

import hashlib
import io
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.images import Images, cifar10
from benchmarks.accuracy.text import Text
from replfx import ReplfxError

MOST = 400_000_000
"""Bytes of sources that are read."""

_SIDE, _ROW = 32, 100  # pixels of an image, and images in a row of a mosaic
_LONGEST = 10_000  # images in a mosaic: JPEG takes 65,535 pixels a side
_QUALITY = 92


def sources(context: int, most: int = MOST, folder: Path | None = None) -> Text:
    """The Python files of all installed packages, byte by byte, each text once; a tenth of the packages is held out.

    Args:
        context: bytes that a model sees at a time.
        most: bytes that are taken, of no package more than a twentieth; packages come in the order of their names'
            digests.
        folder: instead of this Python's site-packages.

    Raises:
        ReplfxError: there is too little text.
    """
    root = folder or Path(sysconfig.get_path("purelib"))
    packages = sorted(root.iterdir(), key=lambda path: _digest(path.name.encode()))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    room = [most - most // 10, most // 10]
    seen: set[bytes] = set()
    for package in packages:
        files = sorted(package.rglob("*.py")) if package.is_dir() else [package] * (package.suffix == ".py")
        held_out = _digest(package.name.encode())[-1] % 10 == 0
        left = most // 20
        for file in files:
            text = file.read_bytes() if file.is_file() else b""
            if len(text) <= min(left, room[held_out]) and (digest := _digest(text)) not in seen:
                seen.add(digest)
                left -= len(text)
                room[held_out] -= len(text)
                parts[held_out].append(text)
    train, valid = (torch.frombuffer(bytearray(b"".join(part) or b" "), dtype=torch.uint8) for part in parts)
    if min(len(train), len(valid)) < 64 * context:
        raise ReplfxError(f"{root} has {len(train)} and {len(valid)} bytes of Python: too few to train and to judge on")
    return Text(train, valid, valid, 256, context, perplexity=False, final_windows=512)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


# ---- CIFAR-10 in one file


def pack(root: Path, path: Path, quality: int = _QUALITY) -> int:
    """Write CIFAR-10 as JPEG mosaics, whose blocks no two images share; 60,000 images take about 40 MB.

    Args:
        root: holds the set, as `benchmarks accuracy` wants it.
        path: of the file.
        quality: of JPEG.

    Returns:
        the bytes of the file.

    Raises:
        ReplfxError: there is no CIFAR-10 in `root`.
    """
    images = cifar10(root)
    content: dict[str, Any] = {"train_labels": images.train_labels.numpy(), "test_labels": images.test_labels.numpy()}
    for name, pixels in (("train", images.train), ("test", images.test)):
        for number, chunk in enumerate(pixels.split(_LONGEST)):
            content[f"{name}_{number}"] = np.frombuffer(_mosaic(chunk, quality), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **content)
    return path.stat().st_size


def _mosaic(pixels: Tensor, quality: int) -> bytes:
    from PIL import Image

    rows = -(-len(pixels) // _ROW)
    full = torch.zeros(rows * _ROW, 3, _SIDE, _SIDE, dtype=torch.uint8)
    full[: len(pixels)] = pixels
    picture = full.view(rows, _ROW, 3, _SIDE, _SIDE).permute(0, 3, 1, 4, 2).reshape(rows * _SIDE, _ROW * _SIDE, 3)
    written = io.BytesIO()
    # Colours at full resolution: else blocks of 16 pixels would still be within an image, but half the colours gone.
    Image.fromarray(picture.contiguous().numpy()).save(written, "JPEG", quality=quality, subsampling=0, optimize=True)
    return written.getvalue()


def unpacked(path: Path) -> Images:
    """Read what `pack` wrote.

    Raises:
        ReplfxError: there is no such file.
    """
    if not path.is_file():
        raise ReplfxError(f"there is no {path}; write it with --pack-cifar, on a machine that has CIFAR-10")
    content = np.load(path)
    parts = []
    for name in ("train", "test"):
        labels = torch.from_numpy(content[f"{name}_labels"])
        keys = sorted(key for key in content if key.startswith(f"{name}_") and key != f"{name}_labels")
        pixels = torch.cat([_pixels(content[key].tobytes()) for key in keys])[: len(labels)]
        parts += [pixels, labels]
    train, train_labels, test, test_labels = parts
    return Images(train, train_labels, test, test_labels)


def _pixels(mosaic: bytes) -> Tensor:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # it is our own file, of a known size
    picture = torch.from_numpy(np.asarray(Image.open(io.BytesIO(mosaic))).copy())
    rows = picture.shape[0] // _SIDE
    return picture.view(rows, _SIDE, _ROW, _SIDE, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, _SIDE, _SIDE).contiguous()
