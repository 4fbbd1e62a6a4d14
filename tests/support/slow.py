"""Cases of which some are slow."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def some_slow(names: Iterable[str], slow: Container[str]) -> list[Any]:
    """The names as cases of a test; those in `slow` are marked so."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]
