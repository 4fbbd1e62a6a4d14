"""Bad input: a clear ReplfxError that says what, where and what to do, and the model as it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import replfx
from tests.support.models import ConvNet, Mlp, Plain, Stop, Tower, tower
from tests.support.snapshots import assert_unchanged, snapshot

X = torch.linspace(-1, 1, 8).view(2, 4)


def refuse(
    kind: type[Exception], message: str, function: Callable[..., Any], model: nn.Module, *rest: Any, **options: Any
) -> None:
    """The call raises this, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(kind, match=message) as caught:
        function(model, *rest, **options)
    assert isinstance(caught.value, replfx.ReplfxError)
    assert_unchanged(model, before)


inplace = pytest.mark.parametrize("inplace", [False, True])


@inplace
def test_no_chain(inplace: bool) -> None:
    model = nn.Sequential(Plain(4, 6), Plain(6, 4))
    message = "no chain of 3 blocks.*`0`: no three like it in a row, only `0` and `1`: a block is replaced between two"
    refuse(replfx.NoChainError, message, replfx.transform, model, X, inplace=inplace)


def test_a_choice_that_is_refused_is_refused_everywhere() -> None:
    """More impossible choices are in tests/chains/test_select.py."""
    model = tower(5)
    for function in (replfx.transform, replfx.inspect, replfx.plan):
        refuse(replfx.PlanError, "every", function, model, X, every=1)
        refuse(replfx.PlanError, "matches nothing; blocks that are in a chain: blocks.0", function, model, select="x*")
        refuse(replfx.PlanError, "`blocks.0` has no kept block on each side", function, model, select="blocks.0")


@inplace
def test_a_plan_for_another_model(inplace: bool) -> None:
    plan = replfx.plan(tower(7))
    other = Tower(*(Mlp(8, 24) for _ in range(7)))
    message = "`blocks.1` of Tower has other parameters than the plan's: .* made for Tower; .*replfx.plan"
    refuse(replfx.PlanError, message, replfx.apply, other, plan, inplace=inplace)
    refuse(replfx.PlanError, "Tower has no module `blocks.5`", replfx.apply, tower(5), plan, inplace=inplace)
    convnet = ConvNet(4)
    message = "ConvNet has no module `blocks.1`: the plan was made for Tower"
    refuse(replfx.PlanError, message, replfx.apply, convnet, plan, inplace=inplace)
    refuse(replfx.PlanError, message, replfx.transform, convnet, plan=plan, inplace=inplace)


def test_a_plan_of_the_wrong_type() -> None:
    model = tower(5)
    text = replfx.plan(model).to_json()
    refuse(replfx.PlanError, "not str; JSON text goes through Plan.from_json", replfx.apply, model, text)
    refuse(replfx.PlanError, "must be a replfx.Plan, not dict", replfx.transform, model, plan={})
    refuse(replfx.PlanError, "plan= or every=, not both", replfx.transform, model, plan=replfx.plan(model), every=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("fusion", "channel"),
        ("operator", {"name": "light"}),
        ("neighbour_gradient", 0.0),
        ("split_at", ["blocks.2"]),
        ("budget", {"parameters": 0.9}),
    ],
)
def test_a_plan_says_how_blocks_are_replaced_too(option: str, value: object) -> None:
    model, message = tower(5), f"give plan= or {option}=, not both"
    plan = replfx.plan(model, operator="identity")
    refuse(replfx.PlanError, message, replfx.transform, model, plan=plan, **{option: value})


@inplace
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 5), "Tower does not run on the example inputs in training mode: RuntimeError"),
        (torch.randn(2, 3, 8, 8), "does not run on the example inputs"),
        ((X, X), "does not run on the example inputs.*argument"),
        ((), "does not run on the example inputs.*argument"),
        ({"y": X}, "does not run on the example inputs.*'y'"),
        ({}, "does not run on the example inputs.*argument"),
        (("x",), "does not run on the example inputs"),
        ([X], r"example_inputs is of type list; give a tensor, a tuple of positional inputs.*\(the_list,\)"),
        (3, "example_inputs is of type int"),
        ("x", "example_inputs is of type str"),
        (torch.empty(2, 4, device="meta"), r"tensor on meta, the model is on cpu; move one of them with \.to"),
        ((torch.empty(2, 4, device="meta"),), "tensor on meta, the model is on cpu"),
        ({"x": torch.empty(2, 4, device="meta")}, "tensor on meta, the model is on cpu"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_example_inputs(inputs: Any, message: str, inplace: bool) -> None:
    model = tower(5)
    refuse(replfx.CaptureError, message, replfx.transform, model, inputs, inplace=inplace)
    refuse(replfx.CaptureError, message, replfx.inspect, model, inputs)
    refuse(replfx.CaptureError, message, replfx.capture, model, inputs)
    refuse(replfx.CaptureError, message, replfx.plan, model, inputs)


@inplace
def test_a_model_that_needs_example_inputs(inplace: bool) -> None:
    message = r"Stop cannot be captured without example inputs.*Pass example_inputs="
    refuse(replfx.CaptureError, message, replfx.transform, Stop(tower(5)), inplace=inplace)


@inplace
def test_a_model_on_the_meta_device(inplace: bool) -> None:
    model = tower(5).to("meta")
    message = "`stem.weight` is on the meta device.*to_empty"
    refuse(replfx.CaptureError, message, replfx.transform, model, inplace=inplace)
    refuse(replfx.CaptureError, message, replfx.transform, model, X, inplace=inplace)
    refuse(replfx.CaptureError, message, replfx.inspect, model, X)
    refuse(replfx.ReplfxError, "meta device", replfx.apply, model, replfx.plan(tower(5)), inplace=inplace)


@inplace
def test_a_model_that_is_transformed_already(inplace: bool) -> None:
    made, plan = replfx.transform(tower(5)), replfx.plan(tower(5))
    message = "transformed already: `blocks.1` is a replaced block; .*materialize or replfx.unroll"
    refuse(replfx.PlanError, message, replfx.transform, made, inplace=inplace)
    refuse(replfx.PlanError, message, replfx.transform, made, X, inplace=inplace)
    refuse(replfx.PlanError, message, replfx.transform, made, plan=plan, inplace=inplace)
    refuse(replfx.PlanError, message, replfx.apply, made, plan, inplace=inplace)
    refuse(replfx.PlanError, message, replfx.inspect, made)
    refuse(replfx.PlanError, message, replfx.plan, made)
    outer = nn.Sequential(made)
    refuse(replfx.PlanError, "`0.blocks.1` is a replaced block", replfx.transform, outer, inplace=inplace)


@inplace
def test_unknown_names(inplace: bool) -> None:
    model = tower(5)
    fusions = "unknown fusion 'scaler'; there are: .*channel, .*scalar, scalar_layer"
    operators = "unknown operator 'bloc'; there are: .*block, .*identity, light"
    for function, options in ((replfx.transform, {"inplace": inplace}), (replfx.inspect, {}), (replfx.plan, {})):
        refuse(replfx.FusionError, fusions, function, model, fusion="scaler", **options)
        refuse(replfx.FusionError, operators, function, model, operator="bloc", **options)


@inplace
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": {"name": "scalar", "start": 1}}, r"`blocks\.1`: fusion 'scalar' does not take .*'start': 1"),
        ({"fusion": {"name": "scalar", "initial": "one"}}, "`initial` must be a finite number, or two, not 'one'"),
        ({"fusion": {"name": "scalar", "initial": float("inf")}}, "`initial` must be a finite number, or two, not inf"),
        ({"fusion": {"name": "scalar", "initial": None}}, "`initial` must be a finite number, or two, not None"),
        ({"fusion": {"initial": 1}}, "fusion must be a name or a dict with a 'name'"),
        ({"fusion": 3}, "fusion must be a name or a dict with a 'name', not 3"),
        ({"fusion": None}, "fusion must be a name"),
        ({"fusion": {"name": "scalar", "initial": {1}}}, "options of fusion 'scalar' must be plain JSON"),
        ({"operator": {"name": "block", "x": 1}}, r"`blocks\.1`: operator 'block' does not take .*'x': 1"),
        ({"operator": ["block"]}, "operator must be a name or a dict with a 'name'"),
        ({"operator": {"name": "light", "initial_gain": "x"}}, r"`blocks\.1`: operator 'light' does not take"),
        ({"operator": {"name": "light", "maps": []}}, "light operator"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str, inplace: bool) -> None:
    refuse(replfx.FusionError, message, replfx.transform, tower(5), X, inplace=inplace, **options)


@pytest.mark.parametrize(
    ("where", "value", "operator", "inplace"),
    [
        ("blocks.0.fc1.weight", float("nan"), "block", False),
        ("blocks.0.fc1.weight", float("inf"), "light", True),
        ("blocks.1.fc2.weight", float("-inf"), "block", True),
        ("blocks.1.fc2.weight", float("nan"), "light", False),
        ("blocks.2.norm.bias", float("inf"), "block", True),
        ("blocks.2.norm.bias", float("-inf"), "light", False),
    ],
)
def test_weights_that_are_not_finite(where: str, value: float, operator: str, inplace: bool) -> None:
    model = tower(5)
    plan = replfx.plan(model, operator=operator)
    with torch.no_grad():
        model.get_parameter(where).view(-1)[1] = value
    message = f"`{where}` has weights that are not finite"
    refuse(replfx.FusionError, message, replfx.transform, model, operator=operator, inplace=inplace)
    refuse(replfx.FusionError, message, replfx.transform, model, X, operator=operator, inplace=inplace)
    refuse(replfx.FusionError, message, replfx.apply, model, plan, inplace=inplace)


def test_weights_that_are_not_finite_where_no_fusion_reads_them() -> None:
    model = tower(5)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    assert replfx.report(replfx.transform(model, X)).replaced == ["blocks.1", "blocks.3"]


@pytest.mark.parametrize("operator", ["block", "light", "identity"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", [False, True])
def test_the_state_dict_of_the_untransformed_model(operator: str, strict: bool, prefix: bool) -> None:
    original = tower(5)
    made = replfx.transform(original, X, operator=operator)
    model: nn.Module = nn.ModuleDict({"inner": made}) if prefix else made
    state = (nn.ModuleDict({"inner": original}) if prefix else original).state_dict()
    with torch.no_grad():
        for tensor in state.values():
            tensor.add_(1)
    before = snapshot(model)
    with pytest.raises(replfx.StateDictError, match=r"`blocks\.1` is a replaced block.*Load it before") as caught:
        model.load_state_dict(state, strict=strict)
    assert isinstance(caught.value, replfx.ReplfxError)
    assert "unroll" in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"every": 2}, {"every": 3}),
        ({"every": 3}, {"every": 2}),
        ({"operator": "light"}, {"operator": "block"}),
        ({"operator": "block"}, {"operator": "light"}),
        ({"operator": "identity"}, {"operator": "block"}),
    ],
    ids=str,
)
def test_the_state_dict_of_another_plan(one: dict[str, Any], other: dict[str, Any]) -> None:
    model, foreign = replfx.transform(tower(7), **one), replfx.transform(tower(7), X, **other).state_dict()
    before = snapshot(model)
    with pytest.raises(replfx.StateDictError, match=r"replfx\.apply|Load it before"):
        model.load_state_dict(foreign)
    assert_unchanged(model, before)


def test_what_a_state_dict_has_more_may_be_left_out() -> None:
    whole = nn.ModuleDict({"one": replfx.transform(tower(7)), "other": replfx.transform(tower(5))})
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(1)
    state = whole.state_dict()
    whole.load_state_dict(state)
    part = nn.ModuleDict({"one": replfx.transform(tower(7))})  # has one of two towers, and two of its seven blocks
    blocks = part.get_submodule("one.blocks")
    for number in range(3, 7):
        setattr(blocks, str(number), nn.Identity())
    found = part.load_state_dict(state, strict=False)
    assert not found.missing_keys
    assert any(key.startswith("one.blocks.3.replfx.") for key in found.unexpected_keys)
    assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected"):
        part.load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_a_block_that_is_replaced_in_the_state_dict_alone(strict: bool) -> None:
    state = replfx.transform(tower(7), every=2).state_dict()
    model = replfx.transform(tower(7), every=3)
    before = snapshot(model)
    with pytest.raises(replfx.StateDictError, match=r"replfx\.apply|Load it before"):
        model.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)


def test_a_state_dict_of_the_same_plan_loads() -> None:
    made = replfx.transform(tower(5))
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    twin = replfx.transform(tower(5))
    assert not twin.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys
    assert torch.equal(twin(X), made(X))


@pytest.mark.parametrize("operator", ["block", "light"])
def test_a_transformed_state_dict_does_not_load_into_the_original(operator: str) -> None:
    # torch itself refuses, and names the fusion layers' keys: the original has nothing of replfx to ask.
    model = tower(5)
    state = replfx.transform(tower(5), operator=operator).state_dict()
    with pytest.raises(
        RuntimeError, match=r'Missing.*blocks\.1\.fc1\.weight.*\n.*Unexpected.*"blocks\.1\.replfx\.fusion\.previous"'
    ):
        model.load_state_dict(state)


@pytest.mark.parametrize("operator", ["block", "light", "identity"])
def test_load_state_dict_refuses_in_both_directions_and_loads_nothing(operator: str) -> None:
    plain, made = tower(5), replfx.transform(tower(5), operator=operator)
    before = snapshot(plain)
    with pytest.raises(replfx.StateDictError, match=r"blocks\.1.*(is not transformed|apply the same plan)"):
        replfx.load_state_dict(plain, made.state_dict())
    assert_unchanged(plain, before)
    before = snapshot(made)
    with pytest.raises(replfx.StateDictError, match="untransformed model"):
        replfx.load_state_dict(made, plain.state_dict())
    assert_unchanged(made, before)


def test_load_state_dict_refuses_another_shape_and_loads_what_fits() -> None:
    model, other = tower(5), tower(5)
    replfx.load_state_dict(model, other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    wrong = {**other.state_dict(), "blocks.0.fc1.weight": torch.zeros(1, 1)}
    before = snapshot(model)
    with pytest.raises(replfx.StateDictError, match=r"blocks\.0\.fc1\.weight"):
        replfx.load_state_dict(model, wrong)
    assert_unchanged(model, before)


def test_ways_out_of_a_model_that_was_never_in() -> None:
    model = tower(5)
    message = "this Tower is not a transformed model; call replfx.transform first"
    for function in (replfx.report, replfx.materialize, replfx.unroll):
        refuse(replfx.PlanError, message, function, model)
    made = replfx.transform(model)
    for plain in (replfx.materialize(made), replfx.unroll(copy.deepcopy(made))):
        for function in (replfx.report, replfx.materialize, replfx.unroll):
            refuse(replfx.PlanError, message, function, plain)


def test_a_block_that_the_light_map_has_no_place_in_cannot_be_unrolled() -> None:
    made = replfx.transform(Tower(*(Mlp(bias=False) for _ in range(5))), X, operator="light")
    message = r"`blocks\.1` cannot be unrolled: .*: `fc2` has no bias"
    refuse(replfx.FusionError, message, replfx.unroll, made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    refuse(replfx.FusionError, message, replfx.unroll, made, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held


@pytest.mark.parametrize("thing", [None, "resnet50", torch.nn.functional.relu, nn.Linear])
def test_what_is_no_module(thing: Any) -> None:
    plan = replfx.Plan("Tower")
    for call in (
        lambda: replfx.transform(thing),
        lambda: replfx.inspect(thing),
        lambda: replfx.plan(thing),
        lambda: replfx.capture(thing),
        lambda: replfx.apply(thing, plan),
        lambda: replfx.report(thing),
        lambda: replfx.materialize(thing),
        lambda: replfx.unroll(thing),
    ):
        with pytest.raises(replfx.ReplfxError, match="Module"):
            call()


def test_a_model_that_cannot_be_copied() -> None:
    class Uncopiable(Tower):
        def __init__(self) -> None:
            super().__init__(*(Mlp() for _ in range(5)))
            self.numbers = (i for i in range(3))

    message = "Uncopiable could not be copied.*`numbers` holds.*generator"
    refuse(replfx.CaptureError, message, replfx.transform, Uncopiable(), X)


def test_every_error_is_a_replfx_error() -> None:
    errors = [getattr(replfx, name) for name in replfx.__all__ if name.endswith("Error")]
    assert len(errors) >= 7
    for error in errors:
        assert issubclass(error, replfx.ReplfxError)
        assert error.__doc__


def test_a_failure_in_place_gives_back_the_very_blocks() -> None:
    model = tower(5)
    blocks = list(model.blocks)
    with torch.no_grad():
        model.blocks[3].fc1.weight.fill_(float("nan"))
    with pytest.raises(replfx.FusionError):
        replfx.transform(model, X, inplace=True)
    assert all(one is other for one, other in zip(blocks, model.blocks, strict=True))
