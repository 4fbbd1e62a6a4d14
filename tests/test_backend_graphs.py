"""What the backend's passes make of Dynamo's graph: how many syntheses are left, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import replfx
from replfx.compile.synthesis import SYNTHESIZE
from replfx.passes.batch_synthesis import BatchSynthesis
from replfx.passes.merge_syntheses import MergeSyntheses
from replfx.passes.synthesis import syntheses_in
from tests.compiled import Compiled, batches, products
from tests.models import Mlp, Tower, tower

X = torch.randn(2, 4)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graph_of(model: nn.Module, x: Tensor = X) -> fx.GraphModule:
    """Dynamo's graph, as a backend gets it."""
    found: list[fx.GraphModule] = []

    def keep(graph_module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.append(graph_module)
        return graph_module.forward

    torch.compile(model, backend=keep, fullgraph=True)(x)
    (graph_module,) = found
    return graph_module


def small(length: int = 7, **options: Any) -> nn.Module:
    """Three replaced blocks of seven, each with two synthesised weights of 16×8 floats: 512 bytes."""
    return replfx.transform(tower(length), X, **options)


@pytest.mark.parametrize("fusion", ["scalar", "scalar_layer", "channel"])
@pytest.mark.parametrize("gradient", [1.0, 0.5, 0.0])
def test_syntheses_of_one_shape_become_one(fusion: str, gradient: float) -> None:
    graph_module = graph_of(small(fusion=fusion, neighbour_gradient=gradient))
    assert len(syntheses_in(graph_module.graph)) == 6
    assert BatchSynthesis(SYNTHESIZE, 2**20)(graph_module).modified
    graph_module.graph.lint()
    assert batches(graph_module) == [3, 3]
    assert syntheses_in(graph_module.graph) == []
    assert products(graph_module) == 0


@pytest.mark.parametrize(("max_bytes", "expected"), [(3 * 512, [3, 3]), (3 * 512 - 1, [2, 2]), (1023, []), (0, [])])
def test_groups_are_cut_under_the_bound(max_bytes: int, expected: list[int]) -> None:
    graph_module = graph_of(small())
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


class Twice(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner.blocks(self.inner.blocks(self.inner.stem(x)))
        return y


@pytest.mark.parametrize("options", [{}, {"operator": "light"}, {"neighbour_gradient": 0.5}])
def test_a_layer_that_is_called_twice_synthesises_once(options: dict[str, Any]) -> None:
    model = Twice(replfx.transform(tower(), X, **options))
    graph_module = graph_of(model)
    count = len(syntheses_in(graph_module.graph))
    formed = sum(node.target is torch.matmul for node in graph_module.graph.nodes) + len(
        [node for node in graph_module.graph.nodes if "matmul" in str(node.target)]
    )
    assert MergeSyntheses()(graph_module).modified
    assert 2 * len(syntheses_in(graph_module.graph)) == count == 8
    left = [node for node in graph_module.graph.nodes if "matmul" in str(node.target)]
    assert 2 * len(left) <= formed
    compiled = Compiled(model, "aot_eager")
    for run in (compiled, model):
        model.zero_grad()
        run(X).square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if run is compiled:
            kept = gradients
    assert compiled.batches[0] == [2, 2]
    torch.testing.assert_close(kept, gradients)  # sums in another order, single precision


def test_shared_readings_scale_their_gradient_once() -> None:
    graph_module = graph_of(small(neighbour_gradient=0.5))
    lerps = [node for node in graph_module.graph.nodes if node.target is torch.lerp]
    MergeSyntheses()(graph_module)
    left = [node for node in graph_module.graph.nodes if node.target is torch.lerp]
    assert (len(lerps), len(left)) == (12, 8), "four kept neighbours with two weights each"


def test_the_backward_pass_is_batched_too() -> None:
    graphs: dict[str, fx.GraphModule] = {}

    def compiler(name: str) -> Any:
        def keep(graph_module: fx.GraphModule, inputs: Any) -> Any:
            graphs[name] = graph_module
            return make_boxed_func(graph_module.forward)

        return keep

    inner = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    model = small()
    torch.compile(model, backend=replfx.backend(inner=inner))(X).sum().backward()
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
    found: list[fx.GraphModule] = []

    def keep(graph_module: fx.GraphModule, inputs: Any) -> Any:
        found.append(graph_module)
        return make_boxed_func(graph_module.forward)

    inner = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(model, backend=replfx.backend(inner=inner))(X).sum().backward()
    assert not any("_foreach" in str(node.target) for node in found[1].graph.nodes)


# ---- what is left alone


def test_a_model_without_fusion_layers_reaches_the_compiler_untouched() -> None:
    seen: list[fx.GraphModule] = []

    def inner(graph_module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(graph_module)
        return graph_module.forward

    backend = replfx.backend(inner=inner)

    def outer(graph_module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        before = graph_module.code
        made = backend(graph_module, inputs)
        assert seen[-1] is graph_module
        assert graph_module.code == before
        return made

    model = tower()
    torch.testing.assert_close(torch.compile(model, backend=outer)(X), model(X))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=outer)(X), model(X))


def test_dynamos_own_graph_stays() -> None:
    codes: list[tuple[str, str]] = []

    def outer(graph_module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        before = graph_module.code
        made = replfx.backend(inner="eager")(graph_module, inputs)
        codes.append((before, graph_module.code))
        return made

    with torch.no_grad():
        torch.compile(small(), backend=outer)(X)
    assert codes[0][0] == codes[0][1]


def test_a_fusion_of_the_users_is_left_alone() -> None:
    @replfx.register_fusion("sum_of_both")
    class Sum(replfx.Fusion):
        def __init__(self, shapes: Any, *, dtype: torch.dtype, device: torch.device) -> None:
            super().__init__(shapes, dtype=dtype, device=device)
            self.a = nn.Parameter(torch.ones(1, dtype=dtype, device=device))

        def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
            return self.a.view(-1, 1) * previous + self.a.view(-1, 1) * next

    model = small(fusion="sum_of_both")
    assert syntheses_in(graph_of(model).graph) == []
    compiled = Compiled(model)
    assert torch.equal(compiled(X), model(X))
    assert compiled.batches[0] == []


class Writes(nn.Module):
    """Writes into a kept neighbour's weight between its uses, or switches a mode there."""

    def __init__(self, inner: Any, how: str, first: int) -> None:
        super().__init__()
        self.inner, self.how, self.first = inner, how, first

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner.stem(x)
        for index, block in enumerate(self.inner.blocks):
            if self.how == "write" and index == 2:
                with torch.no_grad():
                    self.inner.blocks[2].fc1.weight.mul_(0.5)
            if self.how == "write in the same mode" and index == 2:
                self.inner.blocks[2].fc1.weight.detach().mul_(0.5)
            with torch.set_grad_enabled(self.how != "grad" or index % 4 != self.first):
                x = block(x)
        return x


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("how", ["write", "write in the same mode", "grad"])
def test_nothing_moves_over_writes_and_modes(how: str, first: int) -> None:
    def results(compile: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Writes(small(), how, first)
        run: Any = Compiled(model) if compile else model
        y = run(X)
        if how == "grad":  # what was written into has no gradient, in eager mode neither
            y.sum().backward()
        with torch.no_grad():
            z = run(X)
        return [y, z, *(p.grad for p in model.parameters() if p.grad is not None)]

    for one, two in zip(results(compile=True), results(compile=False), strict=True):
        assert torch.equal(one, two)


class Modes(nn.Module):
    """Calls its blocks twice, the first time in another mode."""

    def __init__(self, inner: Any, mode: Any) -> None:
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner.stem(x)
        with self.mode():
            y = self.inner.blocks(x).float()
        z: Tensor = self.inner.blocks(x + y)
        return z


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_nothing_is_merged_or_kept_over_modes(mode: Any) -> None:
    model = Modes(small(5, operator="light"), mode)
    compiled = Compiled(model)
    found = []
    for run in (compiled, model):
        model.zero_grad()
        y = run(X)
        y.sum().backward()
        with torch.no_grad():
            z = run(X)
        found.append([y, z, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("outer", "inner"), [(3, 1), (5, 3)])
def test_a_synthesis_of_a_synthesis_is_no_part_of_its_batch(outer: int, inner: int) -> None:
    model: Any = small()
    reader, read = model.blocks[outer], model.blocks[inner]

    class Synthesised(nn.Module):
        @property
        def weight(self) -> Tensor:
            theta: Tensor = read.synthesized()["fc1.weight"]
            return theta

    readings = [dict(side) for side in reader._readings]
    readings[0]["fc1.weight"] = (Synthesised(), "weight", None)
    reader._readings = tuple(readings)
    compiled = Compiled(model, "aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    compiled.graphs[0].graph.lint()
    assert sorted(compiled.batches[0]) == [2, 3]


def test_neighbours_of_other_shapes_are_aligned_before() -> None:
    model = replfx.transform(
        Tower(*(Mlp(8, hidden) for hidden in (16, 12, 16, 20, 16))), X, select=["blocks.1", "blocks.3"]
    )
    compiled = Compiled(model, "aot_eager")
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    torch.testing.assert_close(compiled(X), model(X))
    assert len(syntheses_in(graph_of(model).graph)) == 4
