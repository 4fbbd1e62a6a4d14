"""The rewrite: model and graph compute the same, and exactly the planned blocks are replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import replfx
from replfx import Choice, FusionLayer
from replfx.passes import FindChains, InsertFusion, SelectBlocks, plan_of, run_passes
from replfx.structure import structural_copy
from replfx.tracing import info_of
from tests.models import GPT, ConvNet, Mlp, tower
from tests.passes.test_find_chains import WithExtras
from tests.tracing.test_ladder import Stop

X = torch.linspace(-1, 1, 8).view(2, 4)
IDS = torch.randint(0, 31, (2, 8))
MODELS = [
    ("tower", lambda: tower(7), X),
    ("convnet", lambda: ConvNet(4), torch.randn(2, 3, 8, 8)),
    ("gpt", lambda: GPT(depth=5), IDS),
    ("extras", WithExtras, X),
    ("recorded", lambda: Stop(tower(7)), X),
    ("recorded extras", lambda: Stop(WithExtras()), X),
]


def fusion_calls(graph: fx.GraphModule) -> list[str]:
    found = [n for n in graph.graph.nodes if n.op == "call_module"]
    return [str(n.target) for n in found if isinstance(graph.get_submodule(str(n.target)), FusionLayer)]


def rewritten(model: nn.Module, inputs: Tensor | None, operator: str = "block") -> tuple[fx.GraphModule, replfx.Plan]:
    graph = replfx.capture(model, inputs)
    run_passes(graph, [FindChains(), SelectBlocks(every=2, operator=Choice(operator))])
    assert run_passes(graph, [InsertFusion(model)]).modified
    return graph, plan_of(graph)


@pytest.mark.parametrize("operator", ["block", "light", "identity"])
@pytest.mark.parametrize(("name", "build", "x"), MODELS, ids=[name for name, _, _ in MODELS])
def test_the_graph_computes_what_the_model_does(name: str, build: type[nn.Module], x: Tensor, operator: str) -> None:
    if "extras" in name and operator == "light":
        pytest.skip("a block of two linear maps in no pair")
    torch.manual_seed(0)
    model = build()
    original = model(x)
    graph, plan = rewritten(model, x, operator)
    graph.graph.lint()
    paths = [r.path for r in plan.replacements]
    assert len(paths) >= 2
    assert fusion_calls(graph) == paths
    assert [p for p, m in model.named_modules() if isinstance(m, FusionLayer)] == paths
    assert all(graph.get_submodule(p) is model.get_submodule(p) for p in paths)
    for mode in (True, False):
        model.train(mode), graph.train(mode)
        assert torch.equal(graph(x), model(x))
    assert not torch.equal(model(x), original)


@pytest.mark.parametrize("operator", ["block", "identity"])
def test_none_of_a_replaced_blocks_nodes_is_left(operator: str) -> None:
    model = tower(5)
    graph, plan = rewritten(model, None, operator)
    inside = tuple(f"{r.path}." for r in plan.replacements)
    assert not [n for n in graph.graph.nodes if str(n.target).startswith(inside)]
    count = sum(n.op == "call_module" and str(n.target).endswith(".fc1") for n in graph.graph.nodes)
    assert count == 5 - len(plan.replacements)


def test_what_a_block_hands_through_is_read_from_its_source() -> None:
    graph, _ = rewritten(WithExtras(), X)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    assert all(order[source] < order[node] for node in graph.graph.nodes for source in node.all_input_nodes)


def test_arguments_that_source_code_cannot_name() -> None:
    class Settings:
        """Something that has no source."""

        scale = 2.0

    class Block(Mlp):
        def forward(self, x: Tensor, *more: Any, **table: Mapping[str, Tensor]) -> Tensor:
            return super().forward(x) * more[0].scale + table["table"]["shift"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            settings, table = Settings(), {"shift": torch.ones(4)}
            for block in self.blocks:
                x = block(x, settings, table=table)
            return x

    for model in (Model(), Stop(Model())):
        graph, plan = rewritten(model, X)
        assert len(plan.replacements) == 1
        assert torch.equal(graph(X), model(X))


def test_gradients_of_the_graph_are_the_models() -> None:
    model = tower(5)
    graph, _ = rewritten(model, X)
    names = [name for name, _ in model.named_parameters()]
    assert set(names) <= {name for name, _ in graph.named_parameters()} | {n for n in names if ".block." in n}
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(model(X).sum(), parameters),
        torch.autograd.grad(graph(X).sum(), parameters),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_layer_holds_no_neighbour_of_the_graphs_copy() -> None:
    model = tower(5)
    graph, _ = rewritten(model, X)
    with torch.no_grad():
        model.blocks[0].fc1.weight.add_(1)
    assert torch.equal(graph(X), model(X))


def test_the_plan_is_carried_out_on_a_structural_copy_too() -> None:
    model = tower(5)
    graph = replfx.capture(model, X)
    run_passes(graph, [FindChains(), SelectBlocks(every=2)])
    twin = structural_copy(model)
    run_passes(graph, [InsertFusion(twin)])
    assert not any(isinstance(m, FusionLayer) for m in model.modules())
    assert sum(isinstance(m, FusionLayer) for m in twin.modules()) == 2


def test_a_graph_of_many_regions_can_be_copied() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList(torch.eye(4) for _ in range(256))

        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                x = torch.relu(x @ w)
            return x

    graph = replfx.capture(Weights())
    passes = [FindChains(), SelectBlocks(every=2), InsertFusion(info_of(graph).root)]
    result = run_passes(graph, passes).graph_module
    assert torch.equal(copy.deepcopy(result)(X), result(X))
