"""Random numbers that depend on what they are for, and not on what was drawn before."""

from __future__ import annotations

import zlib

import torch


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator on the CPU for one purpose at one step or pass of a run.

    PyTorch's generator takes 32 bits of a seed, so they are mixed into that many.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose} {number}".encode()))
