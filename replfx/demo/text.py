"""The demo's data: text as bytes; the sources of Python's standard library where nothing else is asked for."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from replfx.errors import ReplfxError

CONTEXT = 64
"""Bytes that the model sees at a time."""
_WINDOWS = 1024  # at most, that the loss is taken on
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes to judge by, each (N,) uint8."""

    name: str  # what it is, for titles
    # train, held_out: no file is in both.
    train: Tensor
    held_out: Tensor

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """Windows from anywhere, (count, CONTEXT + 1) int64; each byte's successor is its target."""
        starts = torch.randint(len(self.train) - CONTEXT, (count, 1), generator=generator)
        return self.train[starts + torch.arange(CONTEXT + 1)].long()

    def windows(self) -> Tensor:
        """Windows of the held-out part that do not overlap, spread evenly, (n, CONTEXT + 1) int64."""
        count = len(self.held_out) // (CONTEXT + 1)
        every = self.held_out[: count * (CONTEXT + 1)].view(count, CONTEXT + 1)
        taken = min(count, _WINDOWS)
        return every[torch.arange(taken) * count // taken].long()


def load(path: Path | None) -> Text:
    """Read a file, all files of a folder, or Python's standard library.

    A tenth is held out: whole packages and files of the first level, chosen by their names; of a single file its end.

    Raises:
        ReplfxError: there is no such path, or too little text in it.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        return _split("the sources of Python's standard library", library, "*.py")
    if path.is_file():
        everything = _bytes([path])
        cut = len(everything) * 9 // 10
        return _checked(Text(path.name, everything[:cut], everything[cut:]))
    if not path.is_dir():
        raise ReplfxError(f"--text {path}: there is no such file or folder")
    return _split(path.name, path, "*")


def _split(name: str, folder: Path, pattern: str) -> Text:
    parts: tuple[list[Path], list[Path]] = ([], [])
    for file in sorted(folder.rglob(pattern)):
        inside = file.relative_to(folder)
        if file.is_file() and not _LEFT_OUT.intersection(inside.parts):
            parts[_is_held_out(inside.parts[0])].append(file)
    return _checked(Text(name, *(_bytes(files) for files in parts)))


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def _bytes(files: list[Path]) -> Tensor:
    text = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _checked(text: Text) -> Text:
    for name, part in (("to train on", text.train), ("to hold out", text.held_out)):
        if len(part) < 32 * (CONTEXT + 1):
            raise ReplfxError(f"{text.name} has {len(part)} bytes {name}: at least {32 * (CONTEXT + 1)} are needed")
    return text
