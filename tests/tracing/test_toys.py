"""Capture never stops a model that runs, and what it gives computes the same, to the bit, gradients too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import replfx
from replfx.modules.copying import structural_copy
from replfx.modules.tree import tensors_in
from replfx.tracing import Held, info_of
from replfx.tracing.capturing import record_on_fakes, record_on_values
from replfx.tracing.inputs import Inputs
from replfx.tracing.leaks import Traces
from replfx.tracing.symbolic import trace_symbolically
from tests.support.snapshots import assert_unchanged, bits, snapshot
from tests.tracing import toys
from tests.tracing.toys import TOYS, Toy


def build(toy: Toy) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return toy.build()


def run(function: Callable[..., Any], inputs: Inputs, model: nn.Module) -> tuple[Any, list[Any], dict[str, Any]]:
    """Output, gradients of parameters and inputs, and the buffers that it leaves; then the buffers as before."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    leaves = [*model.parameters(), *(t for t in inputs.tensors() if t.requires_grad)]
    torch.manual_seed(1)
    output = function(*inputs.args, **inputs.kwargs)
    losses = [t.abs().square().sum() if not t.is_sparse else t.sum() for t in tensors_in(output) if t.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    after = {name: bits(b) for name, b in model.named_buffers() if name in before}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before:
                buffer.copy_(before[name])
    return output, gradients, after


def same(one: Any, other: Any) -> bool:
    ones, others = tensors_in(one), tensors_in(other)
    return len(ones) == len(others) and all(
        a.dtype == b.dtype and torch.equal(a.to_dense(), b.to_dense()) and a.requires_grad == b.requires_grad
        for a, b in zip(ones, others, strict=True)
    )


def equal_up_to_order(one: Tensor, other: Tensor) -> bool:
    """TorchScript sums in another order once it has compiled: by a few roundings (6e-8) of the largest terms."""
    return torch.allclose(one, other, rtol=0, atol=1e-6 * float(one.abs().max()))


def assert_computes_the_same(graph: fx.GraphModule, model: nn.Module, toy: Toy) -> None:
    graph.graph.lint()
    inputs, twin = (Inputs.of(toy.inputs(), model) for _ in range(2))
    flat = Inputs(tuple(twin.tensors()), {})
    actual, actual_gradients, actual_buffers = run(graph, flat, model)
    expected, gradients, buffers = run(model, inputs, model)
    assert same(expected, actual)
    for name, one, other in zip(
        [n for n, _ in model.named_parameters()] + ["input"] * len(gradients), gradients, actual_gradients, strict=False
    ):
        assert (one is None) == (other is None), name
        assert one is None or (equal_up_to_order if toy.jit else torch.equal)(one, other), name
    assert buffers == actual_buffers


def capture_by(rung: str, model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    if rung == "symbolic":
        return trace_symbolically(structural_copy(model), inputs)
    if rung == "values":
        return record_on_values(model, inputs, Held(model, None))
    traces = Traces(model)
    try:
        graph = record_on_fakes(model, inputs, traces, Held(model, None))
        assert traces.clear()
        return graph
    finally:
        traces.close()


CASES = [(name, rung) for name, toy in TOYS.items() for rung in (*toy.rungs, "values")]


@pytest.fixture(autouse=True)
def _no_caches() -> None:
    """Every test finds the caches of the toys empty."""
    toys.cached_positions.cache_clear()
    toys.cached_pair.cache_clear()
    toys.TABLES.clear()
    toys.NOTED.clear()
    toys.LAST = toys.GlobalCaches.sines = None


@pytest.mark.parametrize(("name", "rung"), CASES)
def test_every_rung_computes_the_same(name: str, rung: str) -> None:
    toy = TOYS[name]
    model = build(toy)
    inputs = Inputs.of(toy.inputs(), model)
    assert_computes_the_same(capture_by(rung, model, inputs), model, toy)


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, True) for name in TOYS), *((name, False) for name in ("Seeded", "TrainingTargets"))],  # these ask for it
)
def test_capture_leaves_the_model_alone_and_gives_what_it_computes(name: str, training: bool) -> None:
    toy = TOYS[name]
    model = build(toy).train(training)
    before = snapshot(model)
    graph = replfx.capture(model, toy.inputs())
    assert_unchanged(model, before)
    assert not any("fake" in type(t).__name__.lower() for t in tensors_in(vars(graph)))
    assert info_of(graph).measured
    assert_computes_the_same(graph, model, toy)


@pytest.mark.parametrize("rung", ["symbolic", "fake", "values"])
def test_a_graph_with_autocast_is_pytorchs_own(rung: str) -> None:
    """It compiles without a break, and is captured once more with all that it switches."""
    toy = TOYS["Autocast"]
    model = build(toy)
    inputs = Inputs.of(toy.inputs(), model)
    graph = capture_by(rung, model, inputs)
    torch._dynamo.reset()
    compiled: Any = torch.compile(graph, fullgraph=True, backend="eager")
    assert_computes_the_same(graph, model, toy)
    assert same(model(*inputs.args), compiled(*inputs.tensors()))
    again = capture_by(rung, graph, Inputs.of(tuple(inputs.tensors()), graph))
    assert same(graph(*inputs.tensors()), again(*inputs.tensors()))
    switches = [[str(node.target) for node in each.graph.nodes if "autocast" in node.name] for each in (graph, again)]
    assert len(switches[0]) == 4
    assert switches[0] == switches[1]
