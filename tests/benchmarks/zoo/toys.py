"""A source of toy models for the zoo's harness: some work, some do what no model should."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.zoo.subject import Subject, Variant
from tests.support.models import tower


class Does(nn.Module):
    """Does something when it is called, and then what a linear layer does."""

    def __init__(self, what: Callable[[], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        self.what()
        return self.linear(x)


def hang() -> None:
    while True:
        time.sleep(1)


def eat() -> None:
    held = []
    while True:
        held.append(torch.ones(2**24))
        time.sleep(0.01)


def fail() -> None:
    raise RuntimeError("not today\nor ever")


def crash() -> None:
    faulthandler.disable()  # pytest's, which would print where
    os.kill(os.getpid(), signal.SIGSEGV)


def images() -> Tensor:
    return torch.randn(2, 4)


BUILDS: dict[str, tuple[Callable[[], nn.Module], ...]] = {
    "tower": (tower,),
    "short": (lambda: tower(2),),
    "second": (lambda: Does(fail), tower),
    "fails": (lambda: Does(fail),),
    "hangs": (lambda: Does(hang),),
    "eats": (lambda: Does(eat),),
    "exits": (lambda: Does(lambda: os._exit(3)),),
    "crashes": (lambda: Does(crash),),
}


def names(store: Path, on_count: Callable[[int, int], object] = lambda done, total: None) -> list[str]:
    return ["toys:tower", "toys:short", "toys:fails"]


def subject(name: str) -> Subject:
    toy = name.partition(":")[2]
    return Subject(name, "toy", tuple(Variant(f"way {n}", build, images) for n, build in enumerate(BUILDS[toy])))
