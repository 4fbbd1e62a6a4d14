"""Random numbers that depend on what they are for, and not on what was drawn before."""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch
from torch import Tensor

from replfx import ReplfxError


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator on the CPU for one purpose at one step or pass of a run.

    PyTorch's generator takes 32 bits of a seed, so they are mixed into that many.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose} {number}".encode()))


def chosen(count: int, seed: int, step: int, size: int) -> list[int]:
    """Which of `count` examples a step's batch has.

    Each pass over them has its own order; what does not fill a batch at its end is left out.

    Raises:
        ReplfxError: there are not enough examples for one batch.

    """
    if size > count:
        raise ReplfxError(f"{count} training images do not fill one batch of {size}")
    passes, place = divmod(step, count // size)
    taken: list[int] = _order(count, seed, passes)[place * size : (place + 1) * size].tolist()
    return taken


@lru_cache(maxsize=2)
def _order(count: int, seed: int, passes: int) -> Tensor:
    """The order of the examples in one pass over them; kept, because each step of the pass asks for it."""
    return torch.randperm(count, generator=generator(seed, "order", passes))
