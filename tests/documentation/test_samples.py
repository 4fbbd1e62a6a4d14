"""Every sample of the README, of the pages of docs/ and of the public docstrings runs as it stands."""

from __future__ import annotations

import copy
import doctest
import inspect
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn.parallel import DistributedDataParallel

import replfx
from replfx.cli import main
from tests.models import tower

ROOT = Path(__file__).parents[2]
NEEDS = {"language.md": "integrations", "unrolling.md": "integrations", "compile.md": "slow"}
"""Pages that need more than the others: packages, or Inductor's compilation."""


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
    """A model, data, an optimizer: what the README and the docstrings speak of."""
    inputs = torch.linspace(-1, 1, 8).view(2, 4)
    model = tower(6)
    return {
        "replfx": replfx,
        "torch": torch,
        "model": model,
        "example_inputs": inputs,
        "batches": [inputs] * 10,
        "steps": 10,
        "optimizer": torch.optim.AdamW(model.parameters()),
    }


README = len(list(parsed(ROOT / "README.md").examples()))


@pytest.mark.parametrize("number", range(README))
def test_the_readme(number: int) -> None:
    """Each sample by itself, for they are alternatives."""
    document = parsed(ROOT / "README.md")
    document.namespace.update(what_a_reader_has())
    list(document.examples())[number].evaluate()


# ---- docstrings


def documented() -> list[Any]:
    """The public names with examples."""
    texts = {name: inspect.getdoc(getattr(replfx, name)) or "" for name in replfx.__all__}
    slow = {"backend": [pytest.mark.slow]}  # Inductor compiles a ViT
    return [pytest.param(name, marks=slow.get(name, [])) for name, text in texts.items() if ">>> " in text]


@contextmanager
def group() -> Iterator[None]:
    """A process group of one, for the examples of several processes."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def build_model() -> nn.Module:
    """A ViT of timm's as the examples have it, but narrow."""
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48)
    return model


@cache
def transformed() -> nn.Module:
    return replfx.transform(build_model(), torch.rand(2, 3, 32, 32))


def namespace_of(name: str) -> dict[str, Any]:
    """What the example of a public name leaves to its reader."""

    def mesh_of(device: str, shape: tuple[int, ...], **names: Any) -> Any:
        return init_device_mesh("cpu", (1,) * len(shape), **names)

    images = torch.rand(2, 3, 32, 32)
    made = copy.deepcopy(transformed())
    torch.save(made.state_dict(), "weights.pt")
    given = {
        **{module.__name__.rpartition(".")[2]: module for module in (nn, replfx, timm, torch, torchvision)},
        **{
            kind.__name__: kind
            for kind in (ColwiseParallel, DistributedDataParallel, Path, replfx.Plan, RowwiseParallel)
        },
        "batches": [images] * 3,
        "build_model": build_model,
        "criterion": nn.functional.cross_entropy,
        "images": images,
        "init_device_mesh": mesh_of,
        "loader": [images] * 2,
        "loss": lambda model, batch: model(batch).mean(),
        "model": made if name in ("Report", "materialize", "synthesize_once") else build_model(),
        "pretrained": build_model(),
        "rank": 0,
        "text": replfx.plan_of(made).to_json(),
        "tokens": images,
        "x": images,
    }
    if name in ("synthesize_once", "unroll"):
        given["optimizer"] = torch.optim.AdamW(made.parameters())
    if name == "synthesize_once":
        given["loader"] = [[(images, torch.tensor([0, 1]))] * 2]
    return given


@pytest.mark.parametrize("name", documented())
def test_a_docstring(name: str) -> None:
    """What it says that an expression gives is what it gives; of others it says nothing."""
    given = namespace_of(name)
    with group() if name in ("check_ranks", "parallelize_module") else nullcontext():
        for example in doctest.DocTestParser().get_examples(inspect.getdoc(getattr(replfx, name)) or ""):
            if not example.want:
                exec(example.source, given)
            else:
                assert eval(example.source, given) == eval(example.want), example.source
