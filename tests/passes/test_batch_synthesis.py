"""Syntheses of one shape become one operation on lists."""

from __future__ import annotations

import pytest

from replfx.compile.batched import SYNTHESIZE
from replfx.dynamo.matching import syntheses_in
from replfx.passes.batch_synthesis import BatchSynthesis
from tests.support.compiled import X, batches, forward_and_backward, graph_of, products, small

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(("fusion", "gradient"), [("scalar", 0.0), ("scalar_layer", 1.0), ("channel", 0.5)])
def test_syntheses_of_one_shape_become_one(fusion: str, gradient: float) -> None:
    graph_module = graph_of(small(fusion=fusion, neighbour_gradient=gradient))
    assert len(syntheses_in(graph_module.graph)) == 6
    assert BatchSynthesis(SYNTHESIZE, 3 * 512)(graph_module).modified  # just enough for three
    graph_module.graph.lint()
    assert batches(graph_module) == [3, 3]
    assert syntheses_in(graph_module.graph) == []
    assert products(graph_module) == 0


def test_groups_are_cut_under_the_bound() -> None:
    graph_module = graph_of(small())
    for max_bytes, expected in ((0, []), (1023, []), (3 * 512 - 1, [2, 2])):  # all of them: the test before
        BatchSynthesis(SYNTHESIZE, max_bytes)(graph_module)
        assert batches(graph_module) == expected
        assert len(syntheses_in(graph_module.graph)) == 6 - sum(expected)


def test_it_comes_before_the_first_use_and_not_earlier() -> None:
    graph_module = graph_of(small())
    BatchSynthesis(SYNTHESIZE, 2**20)(graph_module)
    nodes = list(graph_module.graph.nodes)
    first = next(node for node in nodes if node.target is SYNTHESIZE)
    before = [node for node in nodes[: nodes.index(first)] if "linear" in str(node.target)]
    assert len(before) == 3, "the stem's and those of the first block"


def test_the_backward_pass_is_batched_too() -> None:
    graphs = forward_and_backward(small(), X)
    count = {
        name: {op: sum(f"_foreach_{op}." in str(n.target) for n in g.graph.nodes) for op in ("mul", "add")}
        for name, g in graphs.items()
    }
    # Two shapes. Forward a·θ_prev, b·θ_next and their sum; backward a·dθ and b·dθ, and no sum.
    assert count == {"forward": {"mul": 4, "add": 2}, "backward": {"mul": 4, "add": 0}}
    # What the forward pass keeps for the coefficients' gradients are parameters; no product a·θ_prev is kept.
    kept = graphs["forward"].graph.output_node().all_input_nodes
    assert not any("_foreach_mul" in str(before.target) for node in kept for before in node.all_input_nodes)


def test_a_frozen_neighbour_costs_no_gradient() -> None:
    model = small()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".fusion." in name)
    backward = forward_and_backward(model, X)["backward"]
    assert not any("_foreach" in str(node.target) for node in backward.graph.nodes)
