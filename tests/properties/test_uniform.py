"""The exact properties that always hold, over drawn blocks and plans, against tests/reference.

Property 5, that a model is the same however it is run, is in test_runs.py.
"""

import copy
import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import replfx
from tests.reference import FAMILIES, Stack
from tests.support.compare import (
    assert_as_near,
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    loss_of,
    of_replfx,
    optimizer_for,
    outputs,
    reference_run,
    replaced_by,
    run,
    steps,
)
from tests.support.strategies import FUSIONS, Case, case_of, cases, fits, randomize
from tests.support.without_replfx import run_without_replfx

LOW_AND_HIGH = (torch.float64, torch.float32, torch.bfloat16)


# ---- 1: an empty plan changes nothing


@settings(max_examples=10)
@given(case=cases(dtypes=LOW_AND_HIGH))
def test_an_empty_plan_is_bit_identical(case: Case) -> None:
    model = case.model()
    made = replfx.apply(model, replfx.Plan("Stack"))
    assert made is not model
    assert type(made) is type(model)
    assert list(made.state_dict()) == list(model.state_dict())
    assert_same_bits(run(model, case.inputs()), run(made, case.inputs()))
    for name, tensor in made.state_dict().items():  # running statistics too
        assert torch.equal(tensor, model.state_dict()[name]), name


# ---- 2: a transformed model is the reference


@settings(max_examples=40)
@given(case=cases())
def test_a_transformed_model_is_the_reference(case: Case) -> None:
    """And the model that it was made of is as it was, the report counts its parameters, and all get a gradient."""
    original = case.model()
    before = {name: t.clone() for name, t in original.state_dict().items()}
    model = case.transformed(original)
    after = original.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())
    report = replfx.report(model)
    assert report.parameters_before == sum(p.numel() for p in original.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert_is_the_reference(case, model)


def assert_is_the_reference(case: Case, model: Stack) -> None:
    inputs = case.inputs()
    expected, expected_gradients, expected_buffers = reference_run(case, model, inputs)
    results, gradients = run(model, inputs)
    for one, other in zip(results, expected, strict=True):
        assert_close(one, other, "output")
    assert all(gradient is not None for gradient in gradients.values())
    assert_same_gradients(gradients, expected_gradients)
    for name, buffer in model.named_buffers():
        assert_close(buffer.double(), expected_buffers[name].double(), name)
    for index in replaced_by(model) if case.policy.operator != "identity" else ():
        theta = model.blocks[index].synthesized()
        assert theta
        for name, tensor in theta.items():
            twin = model.blocks[index - 1].get_parameter(name)
            assert tensor.shape[1:] == twin.shape[1:]
            assert tensor.dtype == twin.dtype


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("operator", ["block", "light", "identity", "mixer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_every_operator(family: str, operator: str, fusion: str) -> None:
    """So that no pairing depends on what is drawn."""
    case = case_of(family, operator, fusion, gradient=0.5, hidden=6, depth=4, seed=11)
    if not fits(family, case.options, operator):
        with pytest.raises(replfx.ReplfxError, match=rf"operator '{operator}' does not fit it"):
            case.transformed()
        return
    assert_is_the_reference(case, case.transformed())


@given(case=cases(dtypes=(torch.float32, torch.bfloat16)))
def test_in_low_precision_it_is_as_near_to_the_reference_as_low_precision_allows(case: Case) -> None:
    """The reference, run in the same dtype, says how far rounding takes one from float64."""
    model = case.transformed()
    inputs = case.inputs()
    truth, _, _ = reference_run(case, model, inputs, torch.float64)
    rounded, _, _ = reference_run(case, model, inputs)
    results = outputs(model, inputs)
    for one, other, exact in zip(results, rounded, truth, strict=True):
        assert_as_near(one, other, exact, case.dtype)
    _, gradients = run(model, inputs)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name


# ---- 3: materialize and unroll


@given(case=cases(dtypes=LOW_AND_HIGH))
def test_materialize_keeps_the_outputs_and_nothing_else(case: Case) -> None:
    model = case.transformed()
    plain = replfx.materialize(model)
    assert type(plain) is type(model)
    assert not list(of_replfx(plain))
    assert {module.training for module in plain.modules()} == {case.training}
    assert b"replfx" not in pickle.dumps(plain)
    inputs = case.inputs()
    for one, other in zip(outputs(plain, inputs), outputs(model, inputs), strict=True):
        assert torch.equal(one, other)  # the same operations on the same numbers
    loss_of(outputs(plain, inputs)).backward()
    assert all(p.grad is not None for p in plain.parameters())
    shared = {id(t) for t in model.state_dict(keep_vars=True).values()}
    assert not any(id(t) in shared for t in plain.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("operator", ["block", "light"])
def test_a_frozen_norm_stays_frozen(operator: str) -> None:
    case = case_of("basic", operator, "channel", depth=4, traced_on_inputs=False, seed=3)
    model = case.model()
    for block in model.blocks:
        block.get_submodule("bn2").eval()
    made = case.transformed(model)
    for stage in (made, replfx.materialize(made)):
        norms = [module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)]
        modes = [module.training for module in norms]
        assert modes == ([True, False] * 4 if operator == "block" else [True, False, False, True, False, True, False])
        assert stage.training
        assert stage.blocks[1].training
    inputs = case.inputs()
    for one, other in zip(outputs(replfx.materialize(made), inputs), outputs(made, inputs), strict=True):
        assert torch.equal(one, other)


_LOAD = """
import sys, torch
for model, inputs, expected in torch.load(sys.argv[1], weights_only=False):
    result = model(*inputs)
    assert torch.equal(result, expected)
assert not any(name.split(".")[0] == "replfx" for name in sys.modules)
print("loaded")
"""


def test_a_materialized_model_is_pickled_without_replfx(tmp_path: Path) -> None:
    saved = []
    for family, operator in (("transformer", "block"), ("mlp", "light"), ("convnext", "light"), ("basic", "identity")):
        case = case_of(family, operator, "channel", training=False, depth=4, dtype=torch.float32, seed=3)
        plain = replfx.materialize(case.transformed())
        inputs = tuple(t.detach() for t in case.inputs())
        saved.append((plain, inputs, plain(*inputs).detach()))
    torch.save(saved, tmp_path / "models.pt")
    # In the checkout, where the classes of these blocks are.
    run_without_replfx(_LOAD, tmp_path / "models.pt", folder=Path(__file__).parents[2])


@given(case=cases(operators=("block",)), kind=st.sampled_from(("adamw", "sgd")))
def test_unroll_gives_full_depth_back(case: Case, kind: str) -> None:
    model = case.transformed()
    inputs = case.inputs()
    optimizer = optimizer_for(kind, model)
    steps(model, optimizer, inputs, 2)
    frozen = copy.deepcopy(model)
    indices = replaced_by(model)
    coefficients = {id(p) for name, p in model.named_parameters() if ".fusion." in name}
    kept = {id(p): copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
    held = {id(p): p for p in model.parameters()}

    full = replfx.unroll(model, optimizer)

    assert full is model
    assert not list(of_replfx(full))
    assert list(full.state_dict()) == list(case.model().state_dict())
    for one, other in zip(outputs(full, inputs), outputs(frozen, inputs), strict=True):
        assert torch.equal(one, other)
    in_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in in_optimizer} == {id(p) for p in full.parameters()}
    assert len(in_optimizer) == len(list(full.parameters()))
    assert not coefficients & {id(p) for p in optimizer.state}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in held:  # a new one, whose state is tested in test_schedule.py
            continue
        was = {k: v for k, v in kept[id(parameter)].items() if v is not None}
        assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(v)) for k, v in was.items())
    new = {name: p for name, p in full.named_parameters() if id(p) not in held}
    fresh = list(new.values())
    assert {int(name.split(".")[1]) for name in new} == set(indices)
    before_training = [p.detach().clone() for p in fresh]
    steps(full, optimizer, inputs, 2)
    assert all(p in optimizer.state for p in fresh)
    assert all(math.isfinite(p.detach().sum().item()) for p in full.parameters())
    for before, parameter in zip(before_training, fresh, strict=True):
        assert parameter.grad is not None
        if parameter.grad.abs().max() > 1e-6:  # a block whose ReLUs are all dead has nothing to learn
            assert not torch.equal(before, parameter)


def goes_back(case: Case) -> bool:
    """Whether the operator's map has a place in the full block, by the documentation of `replfx.operators.folding`."""
    family, o = case.family, case.options
    if case.policy.operator == "identity":
        return family != "grouped"
    if case.policy.operator == "mixer":
        return True
    if family.startswith("transformer"):
        return o.hidden >= 2 * o.width and o.bias
    return family in ("basic", "basic3d") or (family == "convnext" and o.hidden >= 2 * o.width)


@given(case=cases(operators=("light", "identity", "mixer")), kind=st.sampled_from(("adamw", "sgd")))
def test_unroll_puts_the_operator_into_the_full_block(case: Case, kind: str) -> None:
    assume(case.policy.operator != "block")
    model, inputs = case.transformed(), case.inputs()
    optimizer = optimizer_for(kind, model)
    steps(model, optimizer, inputs, 2)
    frozen = copy.deepcopy(model)
    if not goes_back(case):
        with pytest.raises(replfx.FusionError, match="cannot be unrolled"):
            replfx.unroll(model, optimizer, inputs)
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), outputs(frozen, inputs), strict=True))
        return
    full = replfx.unroll(model, optimizer, inputs)
    assert full is model
    assert not list(of_replfx(full))
    assert list(full.state_dict()) == list(case.model().state_dict())
    assert all(type(a) is type(b) for a, b in zip(full.modules(), case.model().modules(), strict=True))
    for one, other in zip(outputs(full, inputs), outputs(frozen, inputs), strict=True):
        assert_close(one, other, "output")
    in_optimizer = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_optimizer) == sorted(id(p) for p in full.parameters())
    assert {id(p) for p in optimizer.state} <= {id(p) for p in full.parameters()}
    steps(full, optimizer, inputs, 3)
    assert all(p.grad is not None and math.isfinite(p.detach().sum().item()) for p in full.parameters())


# ---- 4: a plan as JSON gives the same model


@given(case=cases(dtypes=LOW_AND_HIGH))
def test_a_plan_travels_as_json(case: Case) -> None:
    source = case.model()
    given_inputs = case.inputs() if case.traced_on_inputs else None
    plan = replfx.plan(source, given_inputs, **case.policy.arguments())
    text = plan.to_json()
    again = replfx.Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    model = case.transformed()
    assert [r.path for r in plan.replacements] == replfx.report(model).replaced
    fresh = case.model()
    randomize(fresh, case.seed + 5)  # other weights than those that the plan was made for
    twin = case.lay_out(replfx.apply(fresh, again))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert_same_bits(run(model, case.inputs()), run(twin, case.inputs()))


@settings(max_examples=10)
@given(case=cases())
def test_plans_are_deterministic(case: Case) -> None:
    given_inputs = case.inputs() if case.traced_on_inputs else None
    one, other = (replfx.plan(case.model(), given_inputs, **case.policy.arguments()) for _ in range(2))
    assert one == other
    if "every" in case.policy.choice:
        k = case.policy.choice["every"]
        assert [r.path for r in one.replacements] == [f"blocks.{i}" for i in range(k - 1, case.depth - 1, k)]
    elif "select" in case.policy.choice:
        assert [r.path for r in one.replacements] == case.policy.choice["select"]
    chosen = [int(r.path.split(".")[1]) for r in one.replacements]
    assert chosen == sorted(chosen)
    assert chosen[0] > 0
    assert chosen[-1] < case.depth - 1
    assert all(b - a > 1 for a, b in itertools.pairwise(chosen))
