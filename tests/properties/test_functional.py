"""The exact properties over models whose blocks are no modules: pieces of one forward pass."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import replfx
from tests.reference.functional import reference_run
from tests.support.compare import (
    Outcome,
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    loss_of,
    of_replfx,
    optimizer_for,
    run,
    steps,
)
from tests.support.functional import KINDS, Functional, specs
from tests.support.regions import Regions, spec_of
from tests.support.snapshots import assert_unchanged, snapshot
from tests.support.strategies import FUSIONS, randomize

FEW = settings(max_examples=6)


@st.composite
def regions(draw: st.DrawFn) -> Regions:
    """A model of which every=2 replaces something."""
    spec = draw(specs(depths=(3, 6)))
    drawn = Regions(
        spec,
        fusion=draw(st.sampled_from(FUSIONS)),
        neighbour_gradient=draw(st.sampled_from((1.0, 0.5, 0.0))),
        training=draw(st.booleans()),
        # Symbolic tracing takes an input that may be left out to be left out.
        measured=not spec.traceable or spec.extra in ("input", "computed") or draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
    assume(drawn.replaced())
    return drawn


def seeded(model: nn.Module, inputs: tuple[Tensor, ...]) -> Outcome:
    """Outputs and gradients with the same random numbers for dropout each time."""
    torch.manual_seed(11)
    return run(model, inputs)


# ---- 1 and 2: an empty plan, and the reference


@FEW
@given(drawn=regions())
def test_an_empty_plan_is_bit_identical(drawn: Regions) -> None:
    model = drawn.model()
    made = replfx.apply(model, replfx.Plan("Functional"))
    assert type(made) is Functional
    assert list(made.state_dict()) == list(model.state_dict())
    assert_same_bits(seeded(made, drawn.inputs()), seeded(model, drawn.inputs()))


def assert_is_the_reference(drawn: Regions, model: fx.GraphModule) -> None:
    assert replfx.report(model).replaced == drawn.paths(drawn.replaced())
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    for name, _ in model.named_parameters():
        tensors[name].requires_grad_()
    inputs = drawn.inputs()
    torch.manual_seed(11)
    expected = reference_run(drawn.spec, drawn.replaced(), tensors, inputs, training=drawn.training, **drawn.policy())
    loss_of([expected]).backward()
    (result,), gradients = seeded(model, drawn.inputs())
    assert_close(result, expected.detach(), "output")
    for name, gradient in gradients.items():
        wanted = inputs[0].grad if name == "input" else tensors[name].grad
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        if wanted is None:  # the reference does not read it: detached neighbours get zeros of what they are in else
            assert not gradient.any(), name
        else:
            assert_close(gradient, wanted, f"gradient of {name}")


@settings(max_examples=12)
@given(drawn=regions())
def test_a_transformed_model_is_the_reference(drawn: Regions) -> None:
    model, inputs = drawn.model(), drawn.given()  # which seeds
    before = snapshot(model)
    made = replfx.transform(model, inputs, **drawn.policy())
    assert_unchanged(model, before)
    randomize(made, drawn.seed + 2)
    assert_is_the_reference(drawn, made)


@pytest.mark.parametrize(("kind", "number"), [(kind, i) for i, kind in enumerate(KINDS)])
def test_every_kind_of_layer(kind: str, number: int) -> None:
    """So that no pairing depends on what is drawn."""
    for traceable in (True, False):
        spec = spec_of(kind, number, traceable=traceable)
        drawn = Regions(spec, FUSIONS[number % 3], (1.0, 0.5, 0.0)[number % 3])
        assert_is_the_reference(drawn, drawn.transformed())


def test_the_report_says_that_it_became_a_graph() -> None:
    (note,) = replfx.report(Regions(spec_of("mlp")).transformed()).notes
    assert note == "the blocks are no modules: Functional has become a torch.fx.GraphModule"
    notes = replfx.report(Regions(spec_of("mlp", traceable=False)).transformed()).notes
    assert notes[-1] == f"{note}; it was recorded, and holds for inputs of these shapes"
    model = Regions(spec_of("mlp")).model()
    before = snapshot(model)
    with pytest.raises(replfx.PlanError, match="only its graph can be rewritten, not the model itself"):
        replfx.transform(model, inplace=True)
    assert_unchanged(model, before)


class Inside(nn.Module):
    """Convolutions and norms that a submodule's forward calls one by one, in no container."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(5):
                self.add_module(f"conv{i}", nn.Conv2d(4, 4, 3, padding=1, bias=False))
                self.add_module(f"norm{i}", nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            for i in range(5):
                x = x + getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)).relu()
            return x

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 1), self.Body(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("measured", [True, False])
def test_a_repeated_region_inside_of_one_modules_forward(measured: bool) -> None:
    torch.manual_seed(0)
    model, x = Inside().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    made = replfx.transform(model, x if measured else None, operator="block")
    assert isinstance(made, fx.GraphModule)
    replaced = [1, 3]
    assert replfx.report(made).replaced == [f"@body.conv{i}.weight" for i in replaced]
    randomize(made, 1)
    expected = Inside().double()
    state = {name: t for name, t in made.state_dict().items() if not name.startswith("replaced")}
    for i in replaced:
        layer = made.get_submodule(f"replaced_body_conv{i}_weight")
        before, after = (made.get_parameter(f"body.conv{j}.weight") for j in (i - 1, i + 1))
        a, b = layer.get_parameter("replfx.fusion.previous"), layer.get_parameter("replfx.fusion.next")
        state[f"body.conv{i}.weight"] = a * before + b * after
        norm = {name.removeprefix("m1."): t for name, t in layer.state_dict().items() if name.startswith("m1.")}
        state.update({f"body.norm{i}.{name}": t for name, t in norm.items()})
    expected.load_state_dict(state, strict=True)
    plain = replfx.materialize(made)
    assert plain.state_dict().keys() == expected.state_dict().keys()
    for mode in (False, True):
        wanted = expected.train(mode)(x)
        assert_close(made.train(mode)(x), wanted, "output")
        assert_close(plain.train(mode)(x), wanted, "output of the materialized one")


# ---- 3: ways out


def assert_plain(model: nn.Module, drawn: Regions) -> None:
    """A GraphModule of torch's own whose parameters have the original's names; they load into the original."""
    assert isinstance(model, fx.GraphModule)
    assert not list(of_replfx(model))
    assert not any("replfx" in base.__module__ for base in type(model).__mro__)
    original = replace(drawn, seed=drawn.seed + 4).model()
    original.load_state_dict(model.state_dict(), strict=True)
    assert_same_bits(seeded(original, drawn.inputs()), seeded(model, drawn.inputs()))
    saved = pickle.dumps(model)
    assert b"replfx" not in saved
    assert_same_bits(seeded(pickle.loads(saved), drawn.inputs()), seeded(model, drawn.inputs()))


@FEW
@given(drawn=regions())
def test_materialize_gives_the_layers_back(drawn: Regions) -> None:
    model = drawn.transformed()
    plain = replfx.materialize(model)
    assert torch.equal(seeded(plain, drawn.inputs())[0][0], seeded(model, drawn.inputs())[0][0])
    assert_plain(plain, drawn)
    assert replfx.report(model).replaced  # which is as it was


@FEW
@given(drawn=regions(), kind=st.sampled_from(("adamw", "sgd")))
def test_unroll_gives_full_depth_back(drawn: Regions, kind: str) -> None:
    model = drawn.transformed()
    optimizer = optimizer_for(kind, model)
    steps(model, optimizer, drawn.inputs(), 2)
    outputs, gradients = seeded(model, drawn.inputs())[:2]
    was = outputs[0]
    # Blocks without a norm may diverge in these steps, and NaN is equal to nothing.
    assume(all(torch.isfinite(t).all() for t in (*outputs, *gradients.values()) if t is not None))
    full = replfx.unroll(model, optimizer)
    assert full is model
    assert torch.equal(seeded(full, drawn.inputs())[0][0], was)
    assert_plain(full, drawn)
    in_optimizer = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_optimizer) == sorted(id(p) for p in full.parameters())
    steps(full, optimizer, drawn.inputs(), 1)
    assert set(optimizer.state) == set(full.parameters())


# ---- 4 and 5: plans, copies, ways to run


@FEW
@given(drawn=regions())
def test_a_plan_travels_as_json(drawn: Regions) -> None:
    plan = replfx.plan(drawn.model(), drawn.given(), **drawn.policy())
    text = plan.to_json()
    assert replfx.Plan.from_json(text) == plan
    model, fresh = drawn.transformed(), replace(drawn, seed=drawn.seed + 5).model()
    twin = replfx.apply(fresh, replfx.Plan.from_json(text), drawn.given())
    twin.load_state_dict(model.state_dict(), strict=True)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert_same_bits(seeded(twin, drawn.inputs()), seeded(model, drawn.inputs()))


@FEW
@given(drawn=regions())
def test_copies_stand_alone(drawn: Regions) -> None:
    model = drawn.transformed()
    before = seeded(model, drawn.inputs())
    other = copy.deepcopy(model)
    randomize(other, drawn.seed + 9)
    wanted = seeded(other, drawn.inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert replfx.report(twin) == replfx.report(model)
        assert_same_bits(seeded(twin, drawn.inputs()), before)
        twin.load_state_dict(other.state_dict())  # its fusion layers read its own parameters …
        assert_same_bits(seeded(twin, drawn.inputs()), wanted)
        with pytest.raises(replfx.StateDictError):
            twin.load_state_dict(drawn.model().state_dict())
    assert_same_bits(seeded(model, drawn.inputs()), before)  # … and the model's the model's
    inputs = drawn.inputs()  # which seeds
    torch.manual_seed(11)
    called = torch.func.functional_call(model, dict(other.state_dict()), inputs)
    assert torch.equal(called, wanted[0][0])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_compiled_exported_and_checkpointed(kind: str) -> None:
    drawn = Regions(spec_of(kind, 1), neighbour_gradient=0.5)
    model = drawn.transformed()
    wanted, gradients = seeded(model, drawn.inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for call in (compiled, lambda *inputs: checkpoint(model, *inputs, use_reentrant=False)):
        (result,), found = run(model, drawn.inputs(), call)
        assert_close(result, wanted[0], "output")
        assert_same_gradients(found, gradients)
    model.eval()
    inputs = tuple(t.detach() for t in drawn.inputs())
    program = torch.export.export(model, inputs)
    assert set(program.state_dict) == set(model.state_dict())
    assert_close(program.module()(*inputs), model(*inputs).detach(), "exported")
