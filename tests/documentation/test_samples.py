"""Every sample of the README and of docs/ runs as it stands; tests/test_docstrings.py has the docstrings."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import replfx
from replfx.cli import main
from tests.support.models import GPT

ROOT = Path(__file__).parents[2]
NEEDS = {"language.md": "integrations", "unrolling.md": "integrations", "compile.md": "slow"} | dict.fromkeys(
    ("budget.md", "inspect.md", "vision.md"), "slow"
)
"""Pages that need more than the others: packages, Inductor's compilation, or models of real size."""


def run_commands(example: Example) -> None:
    """Run the `replfx inspect` of a block of shell commands; the others install, or train for minutes."""
    for line in str(example.parsed).splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["replfx", "inspect"]:
            assert main(words[1:]) == 0


PARSERS = [PythonCodeBlockParser(), CodeBlockParser("shell", run_commands), SkipParser()]


def parsed(path: Path) -> Document:
    return Sybil(PARSERS, path=str(path.parent), pattern=path.name).parse(path)


def pages() -> list[Any]:
    found = [path for path in sorted((ROOT / "docs").rglob("*.md")) if list(parsed(path).examples())]
    marks = {path: [getattr(pytest.mark, NEEDS[path.name])] if path.name in NEEDS else [] for path in found}
    return [pytest.param(path, id=path.stem, marks=marks[path]) for path in found]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sample may write files, and draws the same numbers each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["replfx"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("path", pages())
def test_a_page(path: Path) -> None:
    """Its samples in one namespace, one after the other."""
    for example in parsed(path).examples():
        example.evaluate()


# ---- samples that leave some names to their reader


def what_a_reader_has() -> dict[str, Any]:
    """A model and data: what the README speaks of."""
    inputs = torch.arange(16).view(2, 8)
    model = GPT()
    return {
        "replfx": replfx,
        "torch": torch,
        "model": model,
        "example_inputs": inputs,
        "batches": [inputs] * 10,
        "steps": 10,
    }


README = len(list(parsed(ROOT / "README.md").examples()))


@pytest.mark.parametrize("number", range(README))
def test_the_readme(number: int) -> None:
    """Each sample by itself, for they are alternatives."""
    document = parsed(ROOT / "README.md")
    document.namespace.update(what_a_reader_has())
    list(document.examples())[number].evaluate()
