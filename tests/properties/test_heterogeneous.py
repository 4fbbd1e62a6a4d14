"""The exact properties over stacks whose blocks differ in shape, and over layers that are in no blocks."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import replfx
from tests.reference.heterogeneous import KINDS, Step, reference_run, replaced_every, spots_of
from tests.support.compare import (
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    loss_of,
    of_replfx,
    optimizer_for,
    outputs,
    run,
    steps,
)
from tests.support.models import Checkpointed
from tests.support.stacks import LIGHT, Drawn, drawn_stacks, needs_shapes, steps_of, various
from tests.support.strategies import FUSIONS, randomize

FEW = settings(max_examples=6)


def expected_run(drawn: Drawn, model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """Output, gradients and buffers of the reference, with the transformed model's weights."""
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    for name, _ in model.named_parameters():
        tensors[name].requires_grad_()
    (x,) = drawn.inputs()
    result = reference_run(
        drawn.kind,
        drawn.steps,
        drawn.replaced(),
        tensors,
        x,
        fusion=drawn.fusion,
        operator=drawn.operator,
        neighbour_gradient=drawn.neighbour_gradient,
        training=drawn.training,
    )
    loss_of([result]).backward()
    gradients = {name: tensors[name].grad for name, _ in model.named_parameters()}
    return result.detach(), {**gradients, "input": x.grad}, tensors


def assert_is_the_reference(drawn: Drawn) -> None:
    model = drawn.transformed()
    assert replfx.report(model).replaced == drawn.paths(drawn.replaced())
    expected, wanted, tensors = expected_run(drawn, model)
    (result,), gradients = run(model, drawn.inputs())
    assert_close(result, expected, "output")
    assert_same_gradients(gradients, wanted)
    for name, buffer in model.named_buffers():
        if name in tensors:
            assert_close(buffer.double(), tensors[name].double(), name)


BOTH = ("block", "block", "light")


@settings(max_examples=15)
@given(drawn=drawn_stacks(operators=BOTH))
def test_a_transformed_stack_is_the_reference(drawn: Drawn) -> None:
    assert_is_the_reference(drawn)


@pytest.mark.parametrize(("kind", "fusion"), [(kind, FUSIONS[i % 3]) for i, kind in enumerate(KINDS)])
def test_every_kind_of_stack(kind: str, fusion: str) -> None:
    """So that no pairing depends on what is drawn."""
    assert_is_the_reference(Drawn(kind, various(kind), fusion, "block", 0.5))
    if kind in LIGHT:  # which takes the place of blocks that keep the shape
        *steps, grouped = various(kind)[1:]
        assert_is_the_reference(Drawn(kind, (*steps, replace(grouped, groups=1)), fusion, "light", 0.5))


@FEW
@given(kind=st.sampled_from(KINDS), k=st.integers(2, 4), data=st.data())
def test_every_replaces_what_its_rule_says(kind: str, k: int, data: st.DataObject) -> None:
    drawn = Drawn(kind, data.draw(steps_of(kind)))
    wanted, model = replaced_every(spots_of(kind, drawn.steps), k), drawn.model()
    if not wanted:
        with pytest.raises(replfx.NoChainError):
            replfx.plan(model, drawn.inputs(), every=k)
        return
    plan = replfx.plan(model, drawn.inputs(), every=k)
    assert [r.path for r in plan.replacements] == drawn.paths(wanted)
    for i, replacement in zip(wanted, plan.replacements, strict=True):
        assert [replacement.previous, replacement.next] == drawn.paths([i - 1, i + 1])
    if not needs_shapes(drawn):
        assert replfx.plan(model, every=k) == plan


# ---- ways out


@FEW
@given(drawn=drawn_stacks(operators=BOTH))
def test_materialize_keeps_the_outputs_and_gives_the_members_back(drawn: Drawn) -> None:
    model, original = drawn.transformed(), drawn.model()
    plain = replfx.materialize(model)
    assert not list(of_replfx(plain))
    assert b"replfx" not in pickle.dumps(plain)
    if drawn.operator == "block":
        assert list(plain.state_dict()) == list(original.state_dict())
        assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
        assert [t.shape for t in plain.state_dict().values()] == [t.shape for t in original.state_dict().values()]
    assert {module.training for module in plain.modules()} == {drawn.training}
    results = outputs(plain, drawn.inputs())
    assert torch.equal(results[0], outputs(model, drawn.inputs())[0])
    loss_of(results).backward()
    assert all(p.grad is not None for p in plain.parameters())


@FEW
@given(drawn=drawn_stacks(), kind=st.sampled_from(("adamw", "sgd")))
def test_unroll_gives_full_depth_back(drawn: Drawn, kind: str) -> None:
    model = drawn.transformed()
    optimizer = optimizer_for(kind, model)
    steps(model, optimizer, drawn.inputs(), 2)
    was = copy.deepcopy(model)
    full = replfx.unroll(model, optimizer)
    assert full is model
    assert not list(of_replfx(full))
    assert list(full.state_dict()) == list(drawn.model().state_dict())
    assert torch.equal(outputs(copy.deepcopy(full), drawn.inputs())[0], outputs(was, drawn.inputs())[0])
    in_optimizer = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_optimizer) == sorted(id(p) for p in full.parameters())
    steps(full, optimizer, drawn.inputs(), 1)
    assert set(optimizer.state) == set(full.parameters())


# ---- plans, copies, casts


@FEW
@given(drawn=drawn_stacks(operators=BOTH))
def test_a_plan_travels_as_json(drawn: Drawn) -> None:
    plan = replfx.plan(drawn.model(), drawn.given(), **drawn.policy())
    assert replfx.Plan.from_json(plan.to_json()) == plan
    model, fresh = drawn.transformed(), replace(drawn, seed=drawn.seed + 5).model()
    twin = replfx.apply(fresh, replfx.Plan.from_json(plan.to_json()))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert_same_bits(run(model, drawn.inputs()), run(twin, drawn.inputs()))


@FEW
@given(drawn=drawn_stacks(operators=BOTH))
def test_copies_casts_and_functional_calls(drawn: Drawn) -> None:
    drawn = replace(drawn, training=False)  # so that a run changes nothing
    model = drawn.transformed()
    before = outputs(model, drawn.inputs())[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, drawn.inputs())[0], before)
        randomize(twin, drawn.seed + 9)
        assert torch.equal(outputs(model, drawn.inputs())[0], before)
        expected, _, _ = expected_run(drawn, twin)
        assert_close(outputs(twin, drawn.inputs())[0].detach(), expected, "output of a changed copy")
    other = copy.deepcopy(twin).state_dict()
    called = torch.func.functional_call(model, other, drawn.inputs())
    assert torch.equal(called, outputs(twin, drawn.inputs())[0])
    low = copy.deepcopy(model).to(torch.float32)
    assert {t.dtype for t in low.state_dict().values() if t.is_floating_point()} == {torch.float32}
    # Of float32's 1e-7 a stack of six normalised blocks loses up to four digits (as it does of float64's).
    assert_close(outputs(low, (drawn.inputs()[0].float(),))[0].detach().double(), before.detach(), "float32", 1e-3)


# ---- checkpointed, compiled and exported


@FEW
@given(drawn=drawn_stacks(operators=BOTH))
def test_checkpointed(drawn: Drawn) -> None:
    """Around each block, and in flat stacks around each layer: a fusion layer is where its first one was."""
    model = drawn.transformed()
    wanted, gradients = run(copy.deepcopy(model), drawn.inputs())
    parts = dict(model.named_parameters())
    holder = getattr(model, "blocks", None) or getattr(model, "features", model)
    for name, part in list(holder._modules.items()):
        if part is not model._modules.get("head"):
            holder._modules[name] = Checkpointed(part)
    (x,) = drawn.inputs()
    result = outputs(model, (x,))[0]
    loss_of([result]).backward()
    assert_close(result.detach(), wanted[0], "output")
    for name, parameter in parts.items():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, gradients[name], f"gradient of {name}")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["units", "flat_conv_norm"])
def test_compiled_and_exported(kind: str) -> None:
    stack = (Step(4, 4), Step(4, 6, kernel=5), Step(6, 6), Step(6, 6, kernel=5))
    drawn = Drawn(kind, stack, neighbour_gradient=0.5)
    model = drawn.transformed()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    wanted, gradients = run(model, drawn.inputs())
    (result,), found = run(twin, drawn.inputs(), compiled)
    assert_close(result, wanted[0], "output")
    assert_same_gradients(found, gradients)
    model.eval()
    x = drawn.inputs()[0].detach()
    program = torch.export.export(model, (x,))
    assert set(program.state_dict) == set(model.state_dict())
    assert_close(program.module()(x), model(x).detach(), "exported")
