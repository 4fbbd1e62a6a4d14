"""Data sets that are read from disk as they are used, and pictures out of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from replfx import ReplfxError

if TYPE_CHECKING:
    from PIL.Image import Image

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)

CPU = torch.device("cpu")

# Of ImageNet's photographs, a channel: what models of photographs are usually fed with.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class Source(Protocol[T_co]):
    """Examples by number: a list of what is in memory, or `OnDisk`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


@dataclass(frozen=True)
class OnDisk(Generic[S, T]):
    """Examples that are read each time they are asked for: for sets that memory does not hold.

    Attributes:
        items: what is known of each without reading it, as its path.
        read: reads one.
    """

    items: Sequence[S]
    read: Callable[[S], T]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> T:
        return self.read(self.items[index])


def made(source: Source[T], indices: Sequence[int], make: Callable[[int, T], R]) -> list[R]:
    """Read examples and make something of each, as many at a time as PyTorch may use threads.

    Args:
        source: the examples.
        indices: which ones.
        make: called with an example's place in `indices` and the example; it may not depend on the others.

    """
    # Reading, decoding and resizing leave the interpreter's lock to others.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda place: make(place, source[indices[place]]), range(len(indices))))


def opened(path: Path) -> Image:
    """A picture, decoded where it is first used.

    Raises:
        ReplfxError: it is not there, or no picture.

    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except (FileNotFoundError, UnidentifiedImageError) as error:
        raise ReplfxError(f"{path} is missing or no picture; is the data set complete?") from error


def pixels(image: Image) -> Tensor:
    """The colours of a picture, (3, H, W) uint8; a grey one has three equal channels."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def normalised(images: Tensor) -> Tensor:
    """Bytes (…, 3, H, W) as floats, shifted and scaled by `MEAN` and `DEVIATION`."""
    mean, deviation = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation
