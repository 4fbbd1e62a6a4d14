"""What the backend's passes make of Dynamo's graph: how many syntheses are left, and what is left alone."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import replfx
from replfx.compile.synthesis import SYNTHESIZE
from replfx.dynamo.syntheses import syntheses_in
from replfx.passes.batch_synthesis import BatchSynthesis
from replfx.passes.fold_affines import FoldAffines
from replfx.passes.merge_syntheses import MergeSyntheses
from replfx.passes.reassociate_products import ReassociateProducts
from tests.support.compiled import Compiled, X, batches, captured, forward_and_backward, graph_of, products, small
from tests.support.models import Mlp, Tower, tower

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(("fusion", "gradient"), [("scalar", 0.0), ("scalar_layer", 1.0), ("channel", 0.5)])
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


# ---- light operators of few tokens


def light() -> nn.Module:
    """Replaced blocks 1 and 3 of five; 16 wide, 40 within: of their 10,240 multiplications a product takes."""
    torch.manual_seed(0)
    return replfx.transform(Tower(*(Mlp(16, 40) for _ in range(5)), width=16), X, operator="light")


def formed(graph_module: fx.GraphModule) -> int:
    return sum(node.target is operator.matmul for node in graph_module.graph.nodes)


@pytest.mark.parametrize("tokens", [1, 10, 11, 40])
def test_a_product_is_formed_where_that_takes_fewer_flops(tokens: int) -> None:
    """16·40·16 + T·16·16 against T·40·32 multiplications: level at T = 10."""
    graph_module, inputs = captured(light(), torch.randn(tokens, 4))
    with FlopCounterMode(display=False) as before:
        (expected,) = graph_module(*inputs)
    assert ReassociateProducts()(graph_module).modified == (tokens < 10)
    graph_module.graph.lint()
    assert formed(graph_module) == (0 if tokens < 10 else 2)
    with FlopCounterMode(display=False) as after:
        (found,) = graph_module(*inputs)
    torch.testing.assert_close(found, expected)
    saved = 2 * 2 * (16 * 40 * 16 + tokens * 16 * 16 - tokens * 40 * 32)
    assert before.get_total_flops() - after.get_total_flops() == max(saved, 0)


class Normed(nn.Module):
    """A pre-norm MLP block."""

    def __init__(self, norm: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = norm, nn.Linear(16, hidden), nn.Linear(hidden, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        return y


def normed(kind: type[nn.Module], hidden: int = 40) -> nn.Module:
    """Replaced blocks 1 and 3 of five, with drawn weights of all norms."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Normed(kind(16), hidden) for _ in range(5)))
    made = replfx.transform(model, torch.randn(2, 16), operator="light").double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    return made


def affines(graph_module: fx.GraphModule) -> int:
    """Norms that still have a weight."""
    norms = [n for n in graph_module.graph.nodes if getattr(n.target, "__name__", "") in ("layer_norm", "rms_norm")]
    assert len(norms) == 5
    return sum(any(arg is not None for arg in (*node.args[2:4], node.kwargs.get("weight"))[:1]) for node in norms)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("tokens", [1, 26, 27, 60])
def test_an_affine_is_folded_where_that_takes_fewer_flops(kind: type[nn.Module], tokens: int) -> None:
    """3·T > 5·16: from 27 tokens on, where the product of 16 rows is formed."""
    model, x = normed(kind), torch.randn(tokens, 16, dtype=torch.float64)
    graph_module, inputs = captured(model, x)
    (expected,) = graph_module(*inputs)
    assert FoldAffines()(graph_module).modified == (tokens > 26)
    graph_module.graph.lint()
    assert affines(graph_module) == (3 if tokens > 26 else 5)
    torch.testing.assert_close(graph_module(*inputs)[0], expected, rtol=1e-12, atol=1e-12)  # float64, in another order


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("hidden", [4, 40])  # two matrices, and their product
def test_with_folded_affines_outputs_and_gradients_stay(kind: type[nn.Module], hidden: int) -> None:
    model, x = normed(kind, hidden), torch.randn(60, 16, dtype=torch.float64)
    assert affines(as_in_eager_mode(model, x).graphs[0]) == 3


class OverTokens(Normed):
    """Normalises over 16 tokens and 16 channels at once: its weight has as many rows as fc1's."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm((16, 16)), 16)


class ByName(Normed):
    """Gives fc1's tensors by name."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), 40)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(input=self.norm(x), weight=self.fc1.weight, bias=self.fc1.bias)
        y: Tensor = x + self.fc2(nn.functional.gelu(hidden))
        return y


class Unused(Normed):
    """Calls a norm whose result it does not need."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), 40)
        self.plain = nn.LayerNorm(16, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        self.plain(x)
        return super().forward(x)


class Squared(Normed):
    """Holds what the norm gives against itself: it is the matrix, too."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), 40)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = nn.functional.linear(h, h)
        y: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(x))) + scores.mean()
        return y


class InAFactor(nn.Module):
    """A residual map whose matrix is a product, given as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.outward, self.inward = nn.Parameter(torch.empty(16, 4)), nn.Parameter(torch.empty(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "by name":
            return x + nn.functional.linear(x, weight=self.outward @ self.inward)
        if self.how == "factor by name":
            return x + nn.functional.linear(x, torch.matmul(self.outward, other=self.inward))
        product = self.outward @ self.inward
        return x + nn.functional.linear(x, product) + nn.functional.linear(product, product).mean()


@pytest.mark.parametrize("block", [OverTokens, ByName, Unused, Squared])
def test_what_is_no_norm_before_a_matrix_is_not_folded(block: type[nn.Module]) -> None:
    x = torch.randn(*(6, 16)[: 1 + (block is OverTokens)], 16).double()
    as_in_eager_mode(by_block([block() for _ in range(5)], x), x)


@pytest.mark.parametrize("how", ["by name", "factor by name", "twice"])
def test_what_is_no_map_by_a_product_is_not_reassociated(how: str) -> None:
    x = torch.randn(2, 16).double()
    as_in_eager_mode(by_block([InAFactor(how) for _ in range(5)], x), x)


def by_block(blocks: list[nn.Module], x: Tensor) -> nn.Module:
    """Every second one replaced by its own computation."""
    model = nn.Sequential(*blocks)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.1)
    return replfx.transform(model.double(), x, operator="block")


def as_in_eager_mode(model: nn.Module, x: Tensor) -> Compiled:
    """Outputs and gradients, and outputs without gradients."""
    compiled = Compiled(model, "aot_eager")
    found = []
    for run in (compiled, model):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        with torch.no_grad():
            found.append((y, run(x), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)  # float64, through five blocks
    return compiled


def test_affines_stay_under_autocast_and_are_folded_without_gradients() -> None:
    model, x = normed(nn.LayerNorm).float(), torch.randn(3, 16)
    with torch.no_grad():
        assert FoldAffines()(graph_of(model, x)).modified
    with torch.autocast("cpu", torch.bfloat16):
        assert not FoldAffines()(graph_of(model, torch.randn(60, 16))).modified


def test_without_gradients_and_with_symbolic_sizes_products_stay() -> None:
    model, x = light(), torch.randn(2, 4)
    with torch.no_grad():
        assert not ReassociateProducts()(graph_of(model, x)).modified
    compiled = Compiled(model, "aot_eager", dynamic=True)
    compiled(x)
    assert formed(compiled.graphs[0]) == 2


class Twice(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner.blocks(self.inner.blocks(self.inner.stem(x)))
        return y


@pytest.mark.parametrize("options", [{"operator": "light"}, {"neighbour_gradient": 0.5}])
def test_a_layer_that_is_called_twice_synthesises_once(options: dict[str, Any]) -> None:
    model = Twice(replfx.transform(tower(), **options))
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
