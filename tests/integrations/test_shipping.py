"""Transformed and materialized models through the ways in which PyTorch models leave Python.

Each is made on one batch and judged on another. `materialize` is the supported way; what also works without is
tested without.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.integrations.shipped import MODELS, OPERATORS, STAGES, Shipped, emptied, scattered, shipped
from tests.support.compiled import needs_compiler
from tests.support.models import GPT
from tests.support.slow import some_slow
from tests.support.without_replfx import run_without_replfx

# Of the largest output. Both sides do the same operations, but another compiler or runtime may add a few hundred
# products up in another order: float32 rounds at 6e-8, bfloat16 at 4e-3, and through the dozen layers of these models
# that stays under ten or so of those. A weight in the wrong place is off by the outputs themselves.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}

every_model = pytest.mark.parametrize("name", some_slow(("conv", "gpt", "vit"), ("conv", "vit")))
every_operator = pytest.mark.parametrize("operator", OPERATORS)
every_stage = pytest.mark.parametrize("stage", STAGES)


def assert_same(result: Tensor, model: Shipped, dtype: torch.dtype = torch.float32) -> None:
    expected = model.on_y()
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    error, scale = (result.detach() - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE[dtype] * scale, f"off by {error:.1e} at a scale of {scale:.1e}"


def reloaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


# ---- torch.export


@every_stage
@every_operator
@every_model
def test_it_is_exported_saved_and_loaded_and_takes_any_batch_size(name: str, operator: str, stage: str) -> None:
    made = shipped(name, operator, stage)
    program = torch.export.export(made.model, (made.x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    loaded = reloaded(program).module()
    for given in (made, Shipped(made.build, made.model, made.x, MODELS[name][1](5))):
        assert_same(loaded(given.y), given)


@pytest.mark.slow
@every_stage
@every_operator
@pytest.mark.parametrize("name", ["conv", "gpt"])
def test_it_is_exported_strictly(name: str, operator: str, stage: str, fresh_dynamo: None) -> None:
    made = shipped(name, operator, stage)
    program = reloaded(torch.export.export(made.model, (made.x,), strict=True))
    assert_same(program.module()(made.y), made)


@pytest.mark.slow
@every_operator
@pytest.mark.parametrize("name", ["conv", "gpt"])
def test_it_is_exported_in_low_precision(name: str, operator: str) -> None:
    made = shipped(name, operator, "transformed", torch.bfloat16)
    assert_same(torch.export.export(made.model, (made.x,)).module()(made.y), made, torch.bfloat16)


_LOAD = """
import sys, torch
exported, traced, y, expected = sys.argv[1:]
y, expected = torch.load(y), torch.load(expected)
for model in (torch.export.load(exported).module(), torch.jit.load(traced)):
    torch.testing.assert_close(model(y), expected)
print("loaded")
"""


@pytest.mark.slow
@every_operator
def test_a_shipped_model_does_not_need_replfx(operator: str, tmp_path: Path) -> None:
    made = shipped("conv", operator, "materialized")
    files = [tmp_path / file for file in ("exported.pt2", "traced.pt", "y.pt", "expected.pt")]
    torch.export.save(torch.export.export(made.model, (made.x,)), files[0])
    torch.jit.trace(made.model, made.x).save(str(files[1]))
    torch.save(made.y, files[2])
    torch.save(made.on_y(), files[3])
    run_without_replfx(_LOAD, *files, folder=tmp_path)


# ---- torch.jit


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_stage
@every_operator
@every_model
def test_it_is_traced_or_says_what_to_trace(name: str, operator: str, stage: str) -> None:
    made = shipped(name, operator, stage)
    if (name, operator, stage) == ("conv", "light", "transformed"):  # its convolution's weight is not its own
        with pytest.raises(replfx.FusionError, match=r"trace replfx\.materialize\(model\)"):
            torch.jit.trace(made.model, made.x)
        assert torch.isfinite(made.on_y()).all()  # and it runs as before
        return
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(made.model, made.x), file)
    file.seek(0)
    assert_same(torch.jit.load(file)(made.y), made)


# ---- ONNX


@pytest.mark.integrations
@every_stage
@every_operator
@every_model
def test_it_runs_in_onnxruntime(name: str, operator: str, stage: str) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    made = shipped(name, operator, stage)
    program: Any = torch.onnx.export(made.model, (made.x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (result,) = session.run(None, {given.name: made.y.numpy()})
    assert_same(torch.from_numpy(result), made)


# ---- AOTInductor


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("name", "operator", "stage"),
    [("conv", "block", "materialized"), ("gpt", "light", "materialized"), ("vit", "block", "transformed")],
)
def test_it_is_packaged_by_aotinductor(
    name: str, operator: str, stage: str, tmp_path: Path, fresh_dynamo: None
) -> None:
    made = shipped(name, operator, stage)
    with torch.no_grad():
        program = torch.export.export(made.model, (made.x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        assert_same(torch._inductor.aoti_load_package(package)(made.y), made)


# ---- safetensors


@pytest.mark.integrations
@every_stage
@every_operator
@every_model
def test_safetensors_saves_and_loads_a_model(name: str, operator: str, stage: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    made = shipped(name, operator, stage)
    safetensors.save_model(made.model, tmp_path / "model.safetensors")
    twin = emptied(made.model)
    assert not torch.equal(twin(made.y), made.on_y())
    missing, unexpected = safetensors.load_model(twin, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert torch.equal(twin(made.y), made.on_y())  # the same operations on the same numbers


@pytest.mark.integrations
@every_operator
@every_model
def test_weights_go_into_a_fresh_model_under_the_same_plan(name: str, operator: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    made = shipped(name, operator, "transformed")
    text = replfx.plan(made.build(), made.x, operator=operator).to_json()
    safetensors.save_file(made.model.state_dict(), tmp_path / "weights.safetensors", metadata={"plan": text})
    with safetensors.safe_open(tmp_path / "weights.safetensors", "pt") as file:
        plan = replfx.Plan.from_json(file.metadata()["plan"])
    fresh = scattered(replfx.apply(made.build(), plan)).eval()
    assert not torch.equal(fresh(made.y), made.on_y())
    replfx.load_state_dict(fresh, safetensors.load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(fresh(made.y), made.on_y())


@pytest.mark.integrations
def test_materialized_weights_go_into_the_untransformed_model_alone(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    made, whole = shipped("gpt", "block", "materialized"), GPT().eval()
    safetensors.save_model(made.model, tmp_path / "model.safetensors")
    safetensors.load_model(whole, tmp_path / "model.safetensors")
    assert torch.equal(whole(made.y), made.on_y())
    with pytest.raises(replfx.StateDictError, match="it is of the untransformed model"):
        safetensors.load_model(replfx.transform(GPT(), made.x), tmp_path / "model.safetensors")


@pytest.mark.integrations
@every_stage
def test_tied_weights_are_saved_once(stage: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    x = MODELS["gpt"][1](2)
    model: nn.Module = scattered(replfx.transform(GPT(tied=True), x)).eval()
    model = replfx.materialize(model) if stage == "materialized" else model
    safetensors.save_model(model, tmp_path / "model.safetensors")
    assert len({"head.weight", "tokens.weight"} & safetensors.load_file(tmp_path / "model.safetensors").keys()) == 1
    twin = emptied(model)
    safetensors.load_model(twin, tmp_path / "model.safetensors")
    assert twin.head.weight is twin.tokens.weight
    assert torch.equal(twin(x), model(x))
