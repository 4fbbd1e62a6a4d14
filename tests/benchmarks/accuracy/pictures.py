"""Small pictures for the tests of loaders, as files; and what holds for the batches of each data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


def drawn(seed: int, height: int, width: int) -> np.ndarray:
    """Random pixels (H, W, 3)."""
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    """Write a picture without loss, whatever its name says, as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")


def assert_depends_on_its_place_alone(data: Any, size: int = 3) -> None:
    """Batch 7 of seed 1 is what it was when others were taken and random numbers drawn since."""
    batch = data.batch(1, 7, size)
    data.batch(2, 3, 4)
    torch.rand(5)
    torch.testing.assert_close(data.batch(1, 7, size), batch, rtol=0, atol=0)
