"""The backend with the kernels in place of its own batched synthesis: `replfx.backend(kernels=True)`."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from tests.kernels.cases import only_interpreted, only_plain
from tests.support.compare import assert_same_run
from tests.support.compiled import Compiled, batches, forward_and_backward, small
from tests.support.strategies import Case, cases

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.slow
@given(case=cases(families=("basic", "transformer", "mlp"), operators=("block", "light")))
@settings(max_examples=2)
def test_drawn_models_give_what_they_give_in_eager_mode(case: Case) -> None:
    model = case.transformed()
    twin = copy.deepcopy(model)
    assert_same_run(model, twin, Compiled(twin, "aot_eager", kernels=True), case)


@only_plain
def test_those_that_stay_alone_run_as_kernels_too() -> None:
    """How many come together for how many bytes is said in tests/compile."""
    compiled = Compiled(small(), kernels=True, max_bytes=1024)
    compiled(torch.randn(2, 4))
    assert sorted(compiled.batches[0], reverse=True) == [2, 2, 1, 1]


@only_plain
def test_without_gradients_they_are_kept() -> None:
    compiled = Compiled(small(), kernels=True, cache=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.randn(2, 4))
    assert compiled.batches == [[3, 3], []], "the part that is kept, and the rest"
    assert compiled.calls == [1, 3]


def traced(device: str) -> dict[str, fx.GraphModule]:
    return forward_and_backward(small().to(device), torch.randn(2, 4, device=device), kernels=True)


def count(graph_module: fx.GraphModule, name: str) -> int:
    return sum(name in str(node.target) for node in graph_module.graph.nodes)


@only_interpreted
def test_backward_reads_each_gradient_once() -> None:
    """What it does for coefficients and neighbours is one operation for all syntheses of a shape."""
    graphs = traced("cpu")
    assert batches(graphs["forward"]) == [3, 3]
    (first, second) = (n for n in graphs["backward"].graph.nodes if "synthesize_backward" in str(n.target))
    for node in (first, second):
        assert len(node.args[0]) == 3
        for gradient in node.args[0]:
            assert list(gradient.users) == [node]


@pytest.mark.gpu
def test_launches_on_a_gpu() -> None:
    """One for the syntheses of a shape; in the backward pass one, and one for the sums of scalar coefficients."""
    graphs = traced("cuda")
    assert count(graphs["forward"], "triton_kernel_wrapper") == 2
    assert count(graphs["backward"], "triton_kernel_wrapper") == 4


@only_plain
def test_without_a_gpu_compilers_see_plain_operations() -> None:
    for graph_module in traced("cpu").values():
        assert count(graph_module, "replfx") == 0
