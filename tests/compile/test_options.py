"""How the backend is asked for: names, options, refusals."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Any

import pytest
import torch

import replfx
from replfx.compile import Backend
from tests.support.models import tower

ROOT = Path(__file__).parents[2]
X = torch.randn(2, 4)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Inductor is configured with, one dict a graph; it compiles nothing."""
    found: list[dict[str, Any]] = []

    def compile_fx(graph_module: Any, inputs: Any, *, config_patches: dict[str, Any], **rest: Any) -> Any:
        found.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return found


def test_modes_and_options_reach_inductor(patches: list[dict[str, Any]]) -> None:
    model = replfx.transform(tower())
    tuned = torch.compile(model, backend=replfx.backend(cache=True), mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        torch.testing.assert_close(tuned(X), model(X))
    assert [patch["max_autotune"] for patch in patches] == [True, True], "the synthesis, and the rest"
    torch.compiler.reset()
    torch.compile(model, backend=replfx.backend(cache=False), options={"max_autotune": True, "cache": True})(X)
    assert patches[2:] == [{"max_autotune": True}]


def test_with_cuda_graphs_nothing_is_kept(patches: list[dict[str, Any]]) -> None:
    model = replfx.transform(tower())
    with torch.no_grad():
        torch.compile(model, backend=replfx.backend(cache=True), mode="max-autotune")(X)
    assert len(patches) == 1
    assert patches[0]["triton.cudagraphs"]


def test_backends_with_the_same_options_are_equal() -> None:
    assert replfx.backend() == replfx.backend() == Backend()  # the defaults of both are the same
    assert replfx.backend() != replfx.backend(max_bytes=1)
    assert hash(replfx.backend()) == hash(replfx.backend())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_byte": 3}, "max_byte.*max_bytes, cache, kernels and inner"),
        ({"max_bytes": -1}, "number of bytes"),
        ({"max_bytes": 1.5}, "number of bytes"),
        ({"cache": "yes"}, "True or False"),
        ({"inner": None}, "name of a backend"),
    ],
)
def test_the_factory_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(replfx.CompileError, match=said):
        replfx.backend(**options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"options": {"max_byte": 3}}, "max_byte.*max_bytes, cache, kernels, inner"),
        ({"options": {"max_bytes": "3"}}, "number of bytes"),
        ({"options": {"max_autotune": "yes"}}, "max_autotune"),
        ({"mode": "fastest"}, "fastest"),
        ({"options": {"inner": "eager", "max_autotune": True}}, "max_autotune.*inner='inductor'"),
    ],
)
def test_compile_refuses(arguments: dict[str, Any], said: str) -> None:
    model = torch.compile(replfx.transform(tower()), backend="replfx", **arguments)
    with pytest.raises(replfx.CompileError, match=said) as raised:
        model(X)
    assert isinstance(raised.value, replfx.ReplfxError)


# ---- registration


def test_the_entry_point_names_what_there_is() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (name, value) = next(iter(declared["torch_dynamo_backends"].items()))
    assert name == "replfx"
    model = replfx.transform(tower())
    loaded = EntryPoint(name, value, "torch_dynamo_backends").load()
    compiled = torch.compile(model, backend=loaded, options={"inner": "eager"})
    torch.testing.assert_close(compiled(X), model(X))


# In a process of its own: what is imported and registered is of the process.
_ENTRY_POINT = """
import torch
from torch._dynamo.backends import registry
from importlib.metadata import EntryPoint
torch._dynamo.list_backends()
registry._BACKENDS["replfx"] = EntryPoint("replfx", "replfx.backends:replfx_backend", "torch_dynamo_backends")
f = torch.compile(lambda x: x + 1, backend="replfx", options={"inner": "eager"})
assert f(torch.ones(1)) == 2
import replfx.compile, replfx.kernels, replfx.measure
"""


@pytest.mark.slow
def test_by_the_entry_point_and_imported_afterwards_and_nothing_is_printed() -> None:
    result = subprocess.run([sys.executable, "-c", _ENTRY_POINT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.slow
def test_dynamo_lists_an_installed_backend_without_importing_replfx(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*install, str(tmp_path), str(ROOT)], check=True)
    (installed,) = [d for d in distributions(path=[str(tmp_path)]) if d.metadata["Name"] == "replfx"]
    assert [e.name for e in installed.entry_points if e.group == "torch_dynamo_backends"] == ["replfx"]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch\n"
        "assert 'replfx' in torch._dynamo.list_backends(); assert 'replfx' not in sys.modules\n"
        "f = torch.compile(lambda x: x + 1, backend='replfx', options={'inner': 'eager'})\n"
        "assert f(torch.ones(1)) == 2; import replfx; print(replfx.__file__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path) in result.stdout
