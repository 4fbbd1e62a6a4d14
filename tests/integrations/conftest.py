"""Modules whose tests all need other packages are imported where they are asked for: torchao alone takes seconds."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """None leaves the question to others."""
    if collection_path.suffix != ".py" or "not integrations" not in config.option.markexpr:
        return None
    return "\npytestmark = pytest.mark.integrations\n" in collection_path.read_text() or None
