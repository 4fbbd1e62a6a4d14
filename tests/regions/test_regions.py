"""Chains of like pieces of a graph that are no modules."""

from __future__ import annotations

import cProfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import replfx.tracing.capturing
from replfx.regions.graph_module import without_regions
from replfx.regions.region import Region, Regions, region_module, replace_regions, root_of
from replfx.regions.search import find_regions
from replfx.tracing import capture, info_of
from tests.support.copies import copied
from tests.support.functional import Functional, Spec, specs, values_of
from tests.support.models import GPT, Products


def captured(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return capture(model, inputs or None)


def the_chain(graph_module: fx.GraphModule) -> tuple[Region, ...]:
    (chain,) = find_regions(graph_module).chains
    return chain


# ---- drawn models


@given(spec=specs())
def test_exactly_the_layers_are_found_in_order(spec: Spec) -> None:
    model = Functional(spec)
    graph_module = captured(model, *model.inputs())
    assert info_of(graph_module).tracer == ("symbolic" if spec.traceable else "recorded")
    regions = the_chain(graph_module)
    roles = [{path: role for role, path in paths.items()} for paths in model.paths]
    named = [
        {name: role.get(path) for name, path in r.parameters.items()} for r, role in zip(regions, roles, strict=True)
    ]
    assert [set(r.parameters.values()) for r in regions] == [set(paths.values()) for paths in model.paths]
    assert all(names == named[0] for names in named)  # one name is one role in every layer
    assert all(len(r.extras) == (spec.extra is not None) for r in regions)


@given(spec=specs(), seed=st.integers(0, 99), training=st.booleans())
def test_a_regions_module_is_the_layer_bit_for_bit(spec: Spec, seed: int, training: bool) -> None:
    torch.manual_seed(seed)
    model = Functional(spec).train(training)
    inputs = model.inputs()
    graph_module = captured(model, *inputs)
    values = values_of(graph_module, inputs)
    for index, region in enumerate(the_chain(graph_module)):
        module = region_module(region, info_of(graph_module).root)
        x, *extras = (values[node] for node in (region.input, *region.extras))
        mine = {role: model.get_parameter(path) for role, path in model.paths[index].items()}
        assert {id(p) for p in module.parameters()} == {id(p) for p in mine.values()}
        x = x.detach().requires_grad_()
        got = outcome(module, (x, *extras), list(mine.values()), seed)
        expected = outcome(partial(model.layer, index), (x, *(extras or (None,))), list(mine.values()), seed)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def outcome(function: Callable[..., Tensor], args: Any, parameters: list[Tensor], seed: int) -> tuple[Tensor, ...]:
    """The result, and the gradients of the activation and of the parameters."""
    torch.manual_seed(seed)
    result = function(*args)
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    return result, *torch.autograd.grad(result, [args[0], *parameters], weights)


@given(spec=specs(), data=st.data())
def test_layers_replaced_by_their_own_modules_change_nothing(spec: Spec, data: st.DataObject) -> None:
    model = Functional(spec).eval()
    inputs = model.inputs()
    graph_module = captured(model, *inputs)
    regions = the_chain(graph_module)
    chosen = data.draw(st.permutations(range(spec.depth)).flatmap(lambda p: st.sampled_from([p[:1], p[:2], p])))
    root = info_of(graph_module).root
    replace_regions(graph_module, [(regions[i], f"layers.{i}", region_module(regions[i], root)) for i in chosen])
    graph_module.graph.lint()
    made = without_regions(graph_module, [regions[i] for i in chosen])
    assert torch.equal(made(*inputs), model(*inputs))
    gone = {path for i in chosen for path in model.paths[i].values()}
    kept = {key for key in made.state_dict() if not key.startswith("layers.")}
    assert kept == set(model.state_dict()) - gone
    assert {id(p) for p in made.parameters()} == {id(p) for p in model.parameters()}


# ---- what is a layer, and what is not


X = torch.linspace(-1, 1, 8).view(2, 4)


def ws(*numbers: int) -> list[list[str]]:
    return [[f"w.{number}"] for number in numbers]


def both_rungs(model: nn.Module, *inputs: Tensor) -> list[Regions]:
    """What is found in the graph of either rung."""
    graph_module = capture(model, inputs or (X,))
    assert info_of(graph_module).tracer == "symbolic"

    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args: Any) -> Any:
            raise RuntimeError("not today")

        patch.setattr(replfx.tracing.capturing, "trace_symbolically", refuse)
        recorded = capture(model, inputs or (X,))
    assert info_of(recorded).tracer == "recorded"
    return [find_regions(graph_module), find_regions(recorded)]


def found_in(model: nn.Module, *inputs: Tensor) -> list[list[list[str]]]:
    """The chains as the paths of their parameters; both rungs must agree."""
    one, two = both_rungs(model, *inputs)
    chains, others = (
        [[list(region.parameters.values()) for region in chain] for chain in found.chains] for found in (one, two)
    )
    assert chains == others
    return chains


def refusals(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    """Why pieces are in no chain; both rungs must name the same ones."""
    one, two = both_rungs(model, *inputs)
    assert one.refused.keys() == two.refused.keys()
    return one.refused


def test_three_make_a_chain_and_two_do_not() -> None:
    assert found_in(Products(3)) == [ws(0, 1, 2)]
    assert found_in(Products(2)) == []


def test_no_repeats_no_chain() -> None:
    class Once(Products):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(x @ self.w[0])
            x = torch.sigmoid(F.linear(x, self.w[1]))
            return torch.einsum("bi,ij->bj", x, self.w[2]).exp() @ self.w[3]

    assert found_in(Once(4)) == []


def test_repeats_without_a_matrix_are_no_layers() -> None:
    class Gains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.ParameterList(torch.randn(4) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            for g in self.g:
                x = torch.tanh(x * g)
            return x

    assert found_in(Gains()) == []


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_weight_that_is_read_elsewhere_too(place: str) -> None:
    class Tied(Products):
        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.w[0].t() if place == "before" else x
            x = super().forward(x)
            return x @ self.w[6].t() if place == "after" else x

    model = Tied(7)
    assert found_in(model) == [ws(*(range(1, 7) if place == "before" else range(6)))]
    assert list(refusals(model).values()) == [
        f"its parameter `w.{0 if place == 'before' else 6}` is read outside of it too"
    ]


def test_tied_layers_divide_the_chain() -> None:
    model = Products(9)
    model.w[4] = model.w[8]
    assert found_in(model) == [ws(0, 1, 2, 3), ws(5, 6, 7)]
    assert "is shared with" in refusals(model)["w.4"]


def test_one_weight_for_all_layers() -> None:
    class Shared(Products):
        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                x = torch.relu(x @ w) @ self.w[0]
            return x

    assert found_in(Shared(5)) == []
    assert "read outside of it too" in refusals(Shared(5))["w.2"]


def test_a_frozen_layer_divides_the_chain() -> None:
    model = Products(7)
    model.w[3].requires_grad_(False)
    assert found_in(model) == [ws(0, 1, 2), ws(4, 5, 6)]
    assert refusals(model) == {"w.3": "its parameter `w.3` is frozen"}


def test_complex_weights_are_not_taken_for_quantised_ones() -> None:
    class Waves(Products):
        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                x = x + torch.tanh(x @ w)
            return x

    model = Waves(5)
    model.w = nn.ParameterList(nn.Parameter(w.detach().to(torch.complex64)) for w in model.w)
    assert found_in(model, X.to(torch.complex64)) == [ws(*range(5))]


def test_a_leak_ends_the_chain_and_an_output_that_is_read_does_not() -> None:
    class Leaking(Products):
        def forward(self, x: Tensor) -> Tensor:
            outputs = []
            for i, w in enumerate(self.w):
                y = x @ w
                if i == 3:
                    leaked = y
                x = x + torch.relu(y)
                outputs.append(x)
            return x + leaked + outputs[1] + outputs[5]

    model = Leaking(7)
    assert found_in(model) == [ws(0, 1, 2), ws(4, 5, 6)]
    assert "is used outside of it" in refusals(model)["w.3"]


def test_two_values_that_cross_are_no_chain() -> None:
    class Reversible(Products):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            for w in self.w:
                x, y = y, x + torch.relu(y @ w)
            return x + y

    assert found_in(Reversible(6)) == []
    assert "besides the output of the one before" in refusals(Reversible(6))["w.2"]


def test_two_different_parts() -> None:
    class Two(Products):
        def __init__(self) -> None:
            super().__init__(4)
            self.v = nn.ParameterList(torch.randn(4, 4) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            for i in range(4):
                x = x + torch.relu(x @ self.v[2 * i]) @ self.v[2 * i + 1]
            return x

    pairs = [[f"v.{2 * i}", f"v.{2 * i + 1}"] for i in range(4)]
    assert found_in(Two()) == [pairs, ws(0, 1, 2, 3)]


@pytest.mark.parametrize(("outer", "expected"), [(2, 2), (3, 1), (4, 1)])
def test_nested_repeats(outer: int, expected: int) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ParameterList(torch.randn(4, 4) for _ in range(3 * outer))
            self.b = nn.ParameterList(torch.randn(4, 4) for _ in range(outer))

        def forward(self, x: Tensor) -> Tensor:
            for i in range(outer):
                for j in range(3):
                    x = torch.relu(x @ self.a[3 * i + j])
                x = torch.sigmoid(F.linear(x, self.b[i]))
            return x

    chains = found_in(Nested())
    assert len(chains) == expected
    if expected == 1:
        assert chains == [[[f"a.{3 * i}", f"a.{3 * i + 1}", f"a.{3 * i + 2}", f"b.{i}"] for i in range(outer)]]
    else:
        assert chains == [[[f"a.{3 * i + j}"] for j in range(3)] for i in range(outer)]


def test_names_say_where_a_layer_begins() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
            self.up = nn.ParameterList(torch.randn(4, 6) for _ in range(4))
            self.down = nn.ParameterList(torch.randn(6, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.first
            for up, down in zip(self.up, self.down, strict=True):
                x = torch.relu(x @ up) @ down
            return x @ self.last

    assert found_in(Wrapped()) == [[[f"up.{i}", f"down.{i}"] for i in range(4)]]


def test_arguments_that_alternate_are_seen_at_a_multiple_of_the_period() -> None:
    class Alternating(Products):
        def forward(self, x: Tensor) -> Tensor:
            for i in range(0, len(self.w), 2):
                y = x + torch.relu(x @ self.w[i])
                x = x + torch.relu(y @ self.w[i + 1])
            return x

    assert found_in(Alternating(8)) == [[[f"w.{i}", f"w.{i + 1}"] for i in range(0, 8, 2)]]


def test_in_place_operations_on_a_layers_own_values_are_fine() -> None:
    class InPlace(Products):
        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                x = F.relu((x @ w).add_(1), inplace=True)
            return x

    assert found_in(InPlace()) == [ws(0, 1, 2, 3, 4)]


def test_in_place_operations_on_what_is_shared_are_not() -> None:
    class Counting(Products):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sum", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            total = self.sum + 0
            for w in self.w:
                x = torch.relu(x @ w)
                total.view(2, 4).add_(x)
            return x + total

    assert found_in(Counting()) == []
    assert "in place" in refusals(Counting())["w.1"]


def test_a_stretch_without_gradients_is_not_divided() -> None:
    class Partly(Products):
        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                with torch.no_grad():
                    scale = x.abs().mean()
                x = torch.relu(x @ w) / scale
            return x

    _, recorded = both_rungs(Partly())
    (chain,) = recorded.chains
    assert [list(r.parameters.values()) for r in chain] == ws(0, 1, 2, 3, 4)
    targets = [node.target for node in chain[2].nodes]
    assert targets.count(torch._C._set_grad_enabled) == 2
    assert targets[0] is torch._C._set_grad_enabled


class Convs(nn.Module):
    """Convolutions and norms that are modules, called one after the other in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1, bias=False) for i in range(5))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = self.relu(bn(conv(x)))
        return self.head(x.mean((2, 3)))


IMAGE = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def test_modules_that_forward_calls_one_by_one() -> None:
    expected = [[f"convs.{i}.weight", f"bns.{i}.weight", f"bns.{i}.bias"] for i in range(5)]
    assert found_in(Convs(), IMAGE) == [expected]
    region = the_chain(capture(Convs(), IMAGE))[2]
    assert list(region.parameters) == ["m0.weight", "m1.weight", "m1.bias"]
    assert region.modules == {"m0": "convs.2", "m1": "bns.2", "m2": "relu"}


def test_the_message_of_an_assertion_is_no_difference() -> None:
    class Asserting(Products):
        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                torch._assert(x.dim() == 2, f"expected two dimensions, got {x.shape}")
                x = torch.relu(x @ w)
            return x

    assert found_in(Asserting()) == [ws(0, 1, 2, 3, 4)]


def test_modules_keep_following_train_and_eval() -> None:
    model = Convs()
    graph_module = capture(model, IMAGE)
    region = the_chain(graph_module)[2]
    module = region_module(region, root_of(graph_module))
    x = torch.randn(2, 4, 6, 6)
    module.train()
    assert torch.equal(module(x), model.bns[2].train()(model.convs[2](x)).relu())
    module.eval()
    assert torch.equal(module(x), model.bns[2].eval()(model.convs[2](x)).relu())


def test_a_module_that_is_called_twice() -> None:
    class Again(Convs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.bns[4](x[:, :1].expand(-1, 4, -1, -1)).mean()

    assert len(found_in(Again(), IMAGE)[0]) == 4
    assert refusals(Again(), IMAGE)["convs.4.weight"] == "`bns.4` is called 2 times in one forward pass"


def test_blocks_that_are_modules_are_found_as_well() -> None:
    model = GPT(depth=4, dropout=0.1)
    ids = torch.arange(8).view(1, 8)
    chains = found_in(model, ids)
    assert [[set(region) for region in chain] for chain in chains] == [
        [{f"blocks.{i}.{name}" for name, _ in model.blocks[i].named_parameters()} for i in range(4)]
    ]


# ---- a graph without its replaced layers


def rewritten() -> tuple[Products, fx.GraphModule]:
    """Of five layers the second and the third are one scaling now."""

    class Model(Products):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))
            self.register_buffer("shift", torch.ones(4), persistent=False)
            self.register_buffer("steps", torch.ones(()))

        def forward(self, x: Tensor) -> Any:
            return F.dropout(super().forward(x) + self.shift + torch.tensor([1.0]), 0.5, self.training)

    model = Model()
    graph_module = capture(model, X)
    regions = the_chain(graph_module)
    replace_regions(graph_module, [(regions[2], "new.c", nn.Linear(4, 4)), (regions[1], "new.b", nn.Identity())])
    return model, without_regions(graph_module, regions[1:3])


def test_what_is_left_has_the_models_own_names() -> None:
    model, made = rewritten()
    assert set(made.state_dict()) == set(model.state_dict()) - {"w.1", "w.2"} | {"new.c.weight", "new.c.bias"}
    assert made.get_parameter("w.3") is model.w[3]
    assert type(made).__name__ == "Model"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(how: str) -> None:
    _, made = rewritten()
    twin = copied(made, how)
    assert twin.state_dict().keys() == made.state_dict().keys()
    assert torch.equal(twin.eval()(X), made.eval()(X))
    torch.manual_seed(0)
    one = made.train()(X)
    torch.manual_seed(0)
    assert torch.equal(twin.train()(X), one)
    assert not torch.equal(one, made.eval()(X))


def test_a_path_that_is_taken() -> None:
    graph_module = capture(Products(), X)
    region = the_chain(graph_module)[1]
    with pytest.raises(ValueError, match=r"`w\.1` is taken by something that is not a module"):
        replace_regions(graph_module, [(region, "w.1", nn.Identity())])


# ---- cost


def deep(depth: int) -> fx.GraphModule:
    """`x = x + relu((x @ w) * mask)`, many times; a graph made by hand."""
    root = nn.Module()
    root.w = nn.ParameterList(torch.zeros(1, 1) for _ in range(depth))
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    for index in range(depth):
        y = graph.call_function(torch.matmul, (x, graph.get_attr(f"w.{index}")))
        y = graph.call_function(torch.relu, (graph.call_function(torch.mul, (y, mask)),))
        x = graph.call_function(torch.add, (x, y))
    graph.output(x)
    return fx.GraphModule(root, graph)


def calls_to_find(graph_module: fx.GraphModule, depth: int) -> int:
    """How many functions are called to find the one chain: unlike time, the same on every machine."""
    with cProfile.Profile() as profile:
        found = find_regions(graph_module)
    assert [len(chain) for chain in found.chains] == [depth]
    return sum(entry.callcount for entry in profile.getstats())


def test_the_search_is_near_linear() -> None:
    assert calls_to_find(deep(4096), 4096) < 16 * 1.3 * calls_to_find(deep(256), 256)
