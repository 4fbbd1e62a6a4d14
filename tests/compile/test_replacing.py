"""torch.compile(model, backend=replfx.backend(every=2)): blocks of a plain model replaced in Dynamo's graph."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import replfx
from tests.reference import FAMILIES
from tests.support.compare import assert_close
from tests.support.compiled import X, assert_is_what_transform_makes, batches, needs_compiler, noting, paths, replacing
from tests.support.functional import Functional, Spec, specs
from tests.support.models import GPT, ConvNet, Mlp, Plain, Row, Tower, tower
from tests.support.strategies import Case, cases

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# ---- what it computes


SINGLE = tuple(name for name in FAMILIES if name != "masked")  # whose blocks give two results


@given(case=cases(operators=("block",), families=SINGLE))
@settings(max_examples=6)
def test_it_is_what_transform_makes(case: Case) -> None:
    assert_is_what_transform_makes(case.model(), case.inputs, case.policy.arguments())


@pytest.mark.slow
@given(spec=specs())
@settings(max_examples=5)
def test_layers_that_are_no_modules_are_found_by_structure(spec: Spec) -> None:
    model = Functional(spec).eval()
    inputs = model.inputs()
    transformed = replfx.transform(copy.deepcopy(model), inputs, every=2)
    compiled, backend = replacing(model, every=2)
    with torch.no_grad():
        compiled(*inputs)
        assert len(paths(backend)) == len(replfx.report(transformed).replaced)
        assert_close(compiled(*inputs), transformed(*inputs), "output")


# ---- one model, several graphs


@pytest.mark.slow
def test_train_and_eval_and_new_shapes_share_the_coefficients() -> None:
    model = ConvNet(depth=4).double()
    compiled, backend = replacing(model, "eager", every=2)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compiled(x)
    known = dict(backend.named_parameters())
    optimizer = torch.optim.SGD([*model.parameters(), *backend.parameters()], 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing new may be made
        for size in (8, 12):
            optimizer.zero_grad()
            compiled(torch.randn(3, 3, size, size, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found = compiled(x)
        compiled(x).sum().backward()
    assert all(known[name] is parameter for name, parameter in backend.named_parameters())
    twin = copy.deepcopy(model)
    reference = replfx.transform(twin, x, select=[path[1:] for path in paths(backend)])
    with torch.no_grad():
        for name, parameter in known.items():
            reference.get_parameter(name).copy_(parameter)
        assert_close(found, reference(x), "output in evaluation mode")


@pytest.mark.slow
def test_one_compilation_for_training_one_for_evaluation_none_a_step() -> None:
    graphs: list[fx.GraphModule] = []
    model = tower(7)
    compiled, _ = replacing(model, noting(graphs), every=2, cache=True)
    for _ in range(3):
        compiled(X).sum().backward()
    model.eval()
    for _ in range(3):
        with torch.no_grad():
            compiled(X)
    # Dynamo's graph is the same for both, which differ in what is differentiated; and what is kept is one more.
    assert len(graphs) == 3
    assert batches(graphs[0]) == [3, 3]
    assert counters["stats"]["unique_graphs"] == 4  # the model's, and what it became, in both modes


def test_sizes_that_change_do_not_compile_anew() -> None:
    compiled, backend = replacing(tower(5), "eager", dynamic=True, every=2)
    for batch in (2, 3, 5):
        compiled(torch.randn(batch, 4))
    before = counters["stats"]["unique_graphs"]
    compiled(torch.randn(7, 4))
    assert counters["stats"]["unique_graphs"] == before
    assert paths(backend) == ["@blocks.1", "@blocks.3"]


@pytest.mark.slow
def test_many_graphs_of_one_model() -> None:
    """Dynamo compiles one code a few times at most; each of our graphs has its own."""
    compiled, backend = replacing(GPT(depth=3).eval(), "eager", dynamic=False, every=2)
    with torch._dynamo.config.patch(recompile_limit=20):
        for length in range(1, 11):
            compiled(torch.zeros(1, length, dtype=torch.long))
    assert paths(backend) == ["@blocks.1"]


class Dropping(nn.Module):
    """A residual block with a drop-path of its own making, which the first one of a tower has not."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.fc = rate, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).relu()
        if self.rate and self.training:
            y = y * torch.empty(len(x), 1).bernoulli_(1 - self.rate) / (1 - self.rate)
        return x + y


@pytest.mark.parametrize("first", [True, False])
def test_blocks_that_compute_differently_in_training_are_one_chain(first: bool) -> None:
    model = Tower(*(Dropping(0.1 * i) for i in range(5))).train(first)
    compiled, backend = replacing(model, every=2)
    compiled(X)
    assert paths(backend) == ["@blocks.1", "@blocks.3"]
    model.train(not first)
    compiled(X)
    assert paths(backend) == ["@blocks.1", "@blocks.3"]


# ---- saved and restored


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_coefficients_are_saved_and_restored(early: bool, aligned: bool) -> None:
    def make() -> nn.Module:
        return Tower(*(Mlp(8, hidden) for hidden in (8, 6, 7, 5, 7))) if aligned else tower(5)

    model = make()
    compiled, backend = replacing(model, every=2, fusion="channel")
    compiled(X)
    for parameter in backend.parameters():
        nn.init.normal_(parameter)
    assert any("gains" in name for name in backend.state_dict()) == aligned
    expected = compiled(X)
    file = io.BytesIO()
    torch.save([model.state_dict(), backend.state_dict()], file)
    file.seek(0)
    weights, coefficients = torch.load(file)
    twin = make()
    twin.load_state_dict(weights)
    compiled, backend = replacing(twin, every=2, fusion="channel")
    if early:
        backend.load_state_dict(coefficients)
        assert backend.state_dict().keys() == coefficients.keys()
        for value in coefficients.values():
            value.zero_()  # what was loaded is a copy
    else:
        compiled(X)
        backend.load_state_dict(coefficients)
    assert torch.equal(compiled(X), expected)


@pytest.mark.slow
def test_a_state_dict_of_other_blocks_or_another_fusion_is_refused() -> None:
    compiled, backend = replacing(tower(7), every=3)
    compiled(X)
    state = {name: value.clone() for name, value in backend.state_dict().items()}
    other, channels = (replacing(tower(7), **options) for options in ({"every": 2}, {"every": 3, "fusion": "channel"}))
    other[1].load_state_dict(state)
    with pytest.raises(
        replfx.CompileError, match=r"has no `blocks\.1\.replfx\.fusion\.previous`: it was saved for other"
    ):
        other[0](X)
    channels[0](X)
    before = {name: value.clone() for name, value in channels[1].state_dict().items()}
    with pytest.raises(replfx.CompileError, match=r"`blocks\.2\.replfx\.fusion\.previous` is \(24,\) here and \(2,\)"):
        channels[1].load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in channels[1].state_dict().items())


def test_coefficients_follow_the_model_to_another_dtype() -> None:
    model = tower(5)
    compiled, backend = replacing(model, every=2)
    compiled(X)
    known = list(backend.parameters())
    model.double()
    assert compiled(X.double()).dtype == torch.float64
    assert [p.dtype for p in known] == [torch.float64] * 4


# ---- what is refused, and why nothing was replaced


def test_before_the_first_call_there_is_nothing() -> None:
    backend: Any = replfx.backend(every=2)
    with pytest.raises(replfx.CompileError, match="compiled nothing yet: call the compiled model once"):
        backend.parameters().__next__()


def test_a_model_with_nothing_to_replace_runs_as_it_is_and_says_why() -> None:
    model = Tower(Mlp(), Plain(), Mlp(), Plain())
    compiled, backend = replacing(model, every=2)
    torch.testing.assert_close(compiled(X), model(X))
    with pytest.raises(replfx.CompileError, match=r"nothing was replaced: .*`@blocks\.0`: no three like it in a row"):
        list(backend.parameters())


def test_a_transformed_model_is_refused() -> None:
    compiled, _ = replacing(replfx.transform(tower(5)), every=2)
    with pytest.raises(replfx.CompileError, match="transformed already: compile it with backend='replfx'"):
        compiled(X)


def test_a_process_group_is_refused() -> None:
    compiled, _ = replacing(tower(5), every=2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(replfx.CompileError, match="would not be averaged over the processes"):
            compiled(X)
    finally:
        torch.distributed.destroy_process_group()


def test_weights_that_are_not_finite_are_refused_and_leave_nothing_behind() -> None:
    model = tower(5)
    compiled, backend = replacing(model, every=2)
    with torch.no_grad():
        model.blocks[2].fc1.weight[0, 0] = torch.nan
    with pytest.raises(replfx.CompileError, match=r"weights that are not finite"):
        compiled(X)
    assert not paths(backend)
    nn.init.zeros_(model.blocks[2].fc1.weight)
    compiled(X)
    assert paths(backend) == ["@blocks.1", "@blocks.3"]


def test_another_model_is_refused() -> None:
    compiled, backend = replacing(tower(5), every=2)
    compiled(X)
    for other in (tower(5), Tower(*(Mlp() for _ in range(6)))):  # Dynamo compiles for the second alone
        with pytest.raises(replfx.CompileError, match="coefficients of another model"):
            torch.compile(other, backend=backend, fullgraph=True)(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "blocks.0"}, "is the first block of its chain"),
        ({"select": [f"blocks.{i}" for i in (1, 2, 3, 4)]}, "is to be replaced too"),
        ({"select": "blocks.1", "operator": "nonsense"}, "unknown operator"),
        ({"every": 1}, "at least 2"),
        ({"every": 2, "fraction": 0.5}, "give one of"),
        ({"evry": 2}, "no option 'evry'"),
    ],
)
def test_an_impossible_choice_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(replfx.ReplfxError, match=message):
        replacing(tower(5), **options)[0](X)


def test_a_selection_that_names_nothing_says_what_there_is() -> None:
    compiled, backend = replacing(tower(3), select="layers.*")
    compiled(X)
    with pytest.raises(replfx.CompileError, match=r"names none of the blocks of a graph: @blocks\.0, @blocks\.1"):
        list(backend.parameters())


class Broken(Row):
    """Breaks Dynamo's graph between its fourth and its fifth block."""

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 1, 2, 3):
            x = self.blocks[i](x)
        torch._dynamo.graph_break()
        for i in (4, 5, 6, 7):
            x = self.blocks[i](x)
        return x


def test_a_graph_break_cuts_the_chain_and_is_named() -> None:
    compiled, backend = replacing(Broken(*(Mlp(4, 8) for _ in range(8))), "eager", fullgraph=False, every=2)
    compiled(X)
    assert paths(backend) == ["@blocks.1", "@blocks.5"]
    (note,) = backend.notes
    assert note.startswith("a graph ends between `@blocks.3` and `@blocks.4`: both stay; Dynamo broke the graph")
    assert "graph_break()" in note


class BrokenBlock(Mlp):
    """Breaks Dynamo's graph inside."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.norm(x))
        torch._dynamo.graph_break()
        return x + self.fc2(self.act(y))


def test_a_graph_break_inside_of_the_blocks_is_named() -> None:
    compiled, backend = replacing(Tower(*(BrokenBlock() for _ in range(5))), "eager", fullgraph=False, every=2)
    compiled(X)
    with pytest.raises(replfx.CompileError, match=r"nothing was replaced: .*Dynamo broke the graph.*graph_break\(\)"):
        list(backend.parameters())


@pytest.mark.slow
def test_torchs_encoder_layer_needs_its_fast_path_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation it is another function, of the same parameters in another order."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(5)]
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 8)
    for fast in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.mha, "_is_fastpath_enabled", fast)
            compiled, _ = replacing(model.train(), "eager", every=2)
            trained = compiled(x)
            model.eval()
            with torch.no_grad():
                if fast:
                    with pytest.raises(
                        replfx.CompileError, match=r"was replaced in a graph before.*set_fastpath_enabled"
                    ):
                        compiled(x)
                else:
                    torch.testing.assert_close(compiled(x), trained)


def test_what_was_replaced_whole_is_refused_in_pieces() -> None:
    """Else its own weights, which nobody trains, would run there."""
    model = tower(5)
    compiled, backend = replacing(model, "eager", fullgraph=False, every=2)
    compiled(X)
    part = torch.compile(lambda x: model.blocks[2](model.blocks[1](x)), backend=backend)
    with pytest.raises(replfx.CompileError, match=r"`@blocks\.1` was replaced in a graph before"):
        part(torch.randn(2, 8))


def test_coefficients_that_come_late_are_warned_of() -> None:
    model = nn.ModuleDict({"one": tower(3), "two": tower(3)})
    compiled, backend = replacing(lambda name, x: model[name](x), "eager", fullgraph=False, every=2)
    compiled("one", X)
    assert len(list(backend.parameters())) == 2
    with pytest.warns(UserWarning, match="is new, and in no optimizer that was made before"):
        compiled("two", X)


# ---- through Inductor


@pytest.mark.slow
@needs_compiler
def test_through_inductor() -> None:
    torch.manual_seed(0)
    model = tower(5)
    backend: Any = replfx.backend(every=2)
    compiled = torch.compile(model, backend=backend, options={"max_bytes": 2**20})
    reference = replfx.transform(copy.deepcopy(model), every=2)
    torch.testing.assert_close(compiled(X), reference(X))
    compiled(X).sum().backward()
    reference(X).sum().backward()
    for name, parameter in backend.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad)
