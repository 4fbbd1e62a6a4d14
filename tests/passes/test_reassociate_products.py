"""Products of two synthesised matrices, formed where that takes fewer operations."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import replfx
from replfx.passes.reassociate_products import ReassociateProducts
from tests.support.compiled import Compiled, X, as_in_eager_mode, by_block, captured, graph_of
from tests.support.models import Mlp, Tower

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def light() -> nn.Module:
    """Replaced blocks 1 and 3 of five; 16 wide, 40 within: of their 10,240 multiplications a product takes."""
    torch.manual_seed(0)
    return replfx.transform(Tower(*(Mlp(16, 40) for _ in range(5)), width=16), X, operator="light")


def formed(graph_module: fx.GraphModule) -> int:
    return sum(node.target is operator.matmul for node in graph_module.graph.nodes)


@pytest.mark.parametrize("tokens", [1, 9, 10])
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


@pytest.mark.parametrize("how", ["by name", "factor by name", "twice"])
def test_what_is_no_map_by_a_product_is_not_reassociated(how: str) -> None:
    x = torch.randn(2, 16).double()
    as_in_eager_mode(by_block([InAFactor(how) for _ in range(5)], x), x)


def test_without_gradients_and_with_symbolic_sizes_products_stay() -> None:
    model, x = light(), torch.randn(2, 4)
    with torch.no_grad():
        assert not ReassociateProducts()(graph_of(model, x)).modified
    compiled = Compiled(model, "aot_eager", dynamic=True)
    compiled(x)
    assert formed(compiled.graphs[0]) == 2
