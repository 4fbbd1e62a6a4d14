"""Property 5: a transformed model is the same however it is run: compiled, exported, checkpointed, copied, cast.

Runs on several processes are in tests/distributed.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import replfx
from tests.reference import FAMILIES, Options
from tests.support.compare import (
    assert_as_near,
    assert_close,
    assert_same_run,
    loss_of,
    outputs,
    reference_run,
    replaced_by,
)
from tests.support.compiled import needs_compiler
from tests.support.models import Checkpointed
from tests.support.strategies import FUSIONS, Case, case_of, cases, fits, randomize

# ---- compiled and exported


def every_case() -> list[tuple[str, str, str, float]]:
    """Each family with each of its operators, fusions and gradients going round."""
    found: list[tuple[str, str, str, float]] = []
    for family in FAMILIES:
        for operator in ("block", "light"):
            if fits(family, Options(width=4), operator):
                found.append((family, operator, FUSIONS[len(found) % 3], (1.0, 0.5, 0.0)[len(found) // 3 % 3]))
    return [*found, ("mlp", "identity", "scalar", 1.0)]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("family", "operator", "fusion", "gradient"), every_case())
def test_compiled_in_one_graph(family: str, operator: str, fusion: str, gradient: float) -> None:
    case = case_of(family, operator, fusion, gradient=gradient)
    model = case.transformed()
    twin = copy.deepcopy(model)
    assert_same_run(model, twin, torch.compile(twin, fullgraph=True, backend="aot_eager"), case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("family", "operator"), [("transformer", "block"), ("basic", "light")])
def test_compiled_by_inductor(family: str, operator: str) -> None:
    case = case_of(family, operator, "channel")
    model = case.transformed()
    twin = copy.deepcopy(model)
    assert_same_run(model, twin, torch.compile(twin, fullgraph=True), case)


@pytest.mark.parametrize(
    ("family", "operator", "fusion", "gradient"),
    [case for case in every_case() if case[1] != "light"],  # which tests/integrations/test_shipping.py exports
)
def test_exported(family: str, operator: str, fusion: str, gradient: float) -> None:
    case = case_of(family, operator, fusion, gradient=gradient, training=False)
    model, inputs = case.transformed(), tuple(t.detach() for t in case.inputs())
    program = torch.export.export(model, inputs)
    assert set(program.state_dict) == set(model.state_dict())
    for one, other in zip(outputs(program.module(), inputs), outputs(model, inputs), strict=True):
        assert_close(one, other, "output")


# ---- checkpointed


@settings(max_examples=10)
@given(case=cases())
def test_checkpointed(case: Case) -> None:
    model = case.transformed()
    twin = copy.deepcopy(model)
    wrapped = copy.copy(twin)  # shares the blocks, and has them in a list of its own
    wrapped._modules = {"blocks": nn.ModuleList([Checkpointed(block) for block in twin.blocks])}
    assert_same_run(model, twin, wrapped, case)


# ---- copied, saved, cast


@settings(max_examples=10)
@given(case=cases(dtypes=(torch.float64, torch.bfloat16)))
def test_copies_are_equal_and_apart(case: Case) -> None:
    model = case.transformed()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = [r.detach() for r in outputs(copy.deepcopy(model), case.inputs())]
        assert list(twin.state_dict()) == list(model.state_dict())
        assert len(list(twin.parameters())) == len(list(model.parameters()))
        assert replfx.report(twin) == replfx.report(model)
        with pytest.raises(replfx.StateDictError):
            twin.load_state_dict(case.model().state_dict())
        for one, other in zip(outputs(copy.deepcopy(twin), case.inputs()), before, strict=True):
            assert torch.equal(one, other)
        randomize(twin, case.seed + 9)  # its fusion layers read its own blocks now, and the model's the model's
        for one, other in zip(outputs(copy.deepcopy(model), case.inputs()), before, strict=True):
            assert torch.equal(one, other)
        expected, _, _ = reference_run(case, twin, case.inputs(), torch.float64)
        if case.dtype == torch.float64:
            for one, other in zip(outputs(twin, case.inputs()), expected, strict=True):
                assert_close(one, other, "output of a changed copy")


@settings(max_examples=10)
@given(case=cases(gradients=(1.0,)))
def test_functional_call_reaches_the_neighbours(case: Case) -> None:
    model, other = case.transformed(), case.transformed()
    randomize(other, case.seed + 9)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    tensors = {name: t.detach().clone() for name, t in tensors.items()}
    result = torch.func.functional_call(model, tensors, case.inputs())
    results = list(result) if isinstance(result, tuple) else [result]
    for one, two in zip(results, outputs(other, case.inputs()), strict=True):
        assert torch.equal(one, two)


@settings(max_examples=10)
@given(case=cases())
def test_cast(case: Case) -> None:
    model = case.transformed()
    low = copy.deepcopy(model).to(torch.float32)
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    inputs = tuple(t.float() if t.is_floating_point() else t for t in case.inputs())
    truth, _, _ = reference_run(case, low, inputs, torch.float64)
    rounded, _, _ = reference_run(case, low, inputs, torch.float32)
    for one, other, exact in zip(outputs(low, inputs), rounded, truth, strict=True):
        assert one.dtype == torch.float32
        assert_as_near(one, other, exact, torch.float32)
    back = copy.deepcopy(low).to(torch.float64)
    assert {p.dtype for p in back.parameters()} == {torch.float64}


@settings(max_examples=10)
@given(case=cases(families=tuple(name for name, family in FAMILIES.items() if family.spatial)))
def test_channels_last(case: Case) -> None:
    layout = torch.channels_last if FAMILIES[case.family].spatial == 2 else torch.channels_last_3d
    original, model = case.model(), case.transformed()
    (x,) = case.inputs()
    x = x.detach().contiguous()
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    other = copy.deepcopy(model).to(memory_format=layout)
    y = x.clone(memory_format=layout)
    assert_close(other(y), plain(x), "output in channels_last")
    was = original.to(memory_format=layout)(y)
    assert other(y).is_contiguous(memory_format=layout) or not was.is_contiguous(memory_format=layout)


@given(case=cases(dtypes=(torch.float32,)))
@settings(max_examples=10)
def test_autocast(case: Case) -> None:
    model, original = case.transformed(), case.model()
    inputs = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        results, reference = outputs(copy.deepcopy(model), inputs), outputs(original, inputs)
        rounded, _, _ = reference_run(case, model, inputs)
    truth, _, _ = reference_run(case, model, inputs, torch.float64)
    if case.policy.operator == "block":  # the same computation, so the same dtypes
        assert [r.dtype for r in results] == [r.dtype for r in reference]
    # A light operator rounds the product of its two maps where the reference rounds the activation between them.
    for one, other, exact in zip(results, rounded, truth, strict=True):
        assert_as_near(one, other, exact, torch.bfloat16)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(outputs(model, inputs))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name
    assert replaced_by(model)
