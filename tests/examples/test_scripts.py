"""The scripts and the notebook of examples/: they train, go on after an interruption, and leave plain weights."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import replfx

pytestmark = pytest.mark.integrations

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = 150  # a script that is longer is not one to start from


def script(name: str) -> ModuleType:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= LINES
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of three strengths."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        for split in ("train", "val"):
            path = root / split / f"class{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 40), 20 + 60 * (number % 3)).convert("RGB").save(path)
    return root


def weights_in(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(other[name], theta) for name, theta in one.items())


GROWN = ["--operator", "identity", "--unroll-at", "0.5", "--start", "copies"]


@pytest.mark.parametrize("more", [["--unroll-at", "0.5"], GROWN, ["--operator", "mixer"], ["--no-replace"]])
def test_images(pictures: Path, tmp_path: Path, more: list[str]) -> None:
    """And goes on from the checkpoints of before the switch and of after it."""
    import timm

    train_images = script("train_images")

    def train(output: Path) -> dict[str, Tensor]:
        options = ["--data-root", str(pictures), "--model", "test_vit", "--image-size", "32", "--workers", "0"]
        options += ["--batch-size", "8", "--epochs", "4", "--output", str(output), *more]
        assert 0 <= train_images.train(train_images.parse(options)) <= 1
        return weights_in(output / "model.safetensors")

    weights = train(tmp_path / "whole")
    if "mixer" not in more:
        timm.create_model("test_vit", img_size=32, num_classes=3).load_state_dict(weights)
    assert list((tmp_path / "whole").glob("**/events.out.tfevents.*"))
    for epochs in (1, 3) if "--unroll-at" in more else ():
        output = tmp_path / f"stopped-{epochs}"
        for epoch in range(1, epochs + 1):
            name = f"epoch-{epoch:04}"
            shutil.copytree(tmp_path / "whole" / name, output / name)
        (output / f".epoch-{epochs + 1:04}.part").mkdir()  # a kill left it half-written
        assert same(train(output), weights)


@pytest.mark.parametrize(
    "more", [["--unroll-at", "0.5"], ["--operator", "block"], ["--model", "llama", "--no-replace"]]
)
def test_language(tmp_path: Path, more: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    train_language = script("train_language")
    text = tmp_path / "text.txt"
    text.write_bytes(b"the sum of all squares; " * 200)

    def train(output: Path) -> dict[str, Tensor]:
        options = ["--text", str(text), "--layers", "4", "--width", "16", "--heads", "2", "--context", "16"]
        options += ["--steps", "16", "--batch-size", "4", "--save-every", "4", "--output", str(output), *more]
        assert train_language.train(train_language.parse(options)) < 8  # bits a byte, which chance has
        read = replfx.from_pretrained if "block" in more else AutoModelForCausalLM.from_pretrained
        assert sum(p.numel() for p in read(output / "final").parameters()) > 0
        return weights_in(output / "final" / "model.safetensors")

    weights = train(tmp_path / "whole")
    assert list((tmp_path / "whole").glob("**/events.out.tfevents.*"))
    if "--unroll-at" in more:
        shutil.copytree(tmp_path / "whole" / "checkpoint-12", tmp_path / "stopped" / "checkpoint-12")
        assert same(train(tmp_path / "stopped"), weights)
        assert same(train(tmp_path / "whole"), weights)  # nothing is left to do


def test_the_notebook() -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "compress_pretrained.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "light, calibrated" in printed
