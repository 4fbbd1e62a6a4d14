"""Small pictures for the tests of loaders, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def drawn(seed: int, height: int, width: int) -> np.ndarray:
    """Random pixels (H, W, 3)."""
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    """Write a picture without loss, whatever its name says, as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")
