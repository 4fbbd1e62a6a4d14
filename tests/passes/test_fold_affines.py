"""A norm's weight and bias, folded into the matrix behind it where that takes fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import replfx
from replfx.passes.fold_affines import FoldAffines
from tests.support.compiled import as_in_eager_mode, by_block, captured, graph_of
from tests.support.models import Mlp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def normed(kind: type[nn.Module], hidden: int = 40) -> nn.Module:
    """Replaced blocks 1 and 3 of five, with drawn weights of all norms."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Mlp(16, hidden, norm=kind(16)) for _ in range(5)))
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
@pytest.mark.parametrize("tokens", [26, 27])
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
@pytest.mark.parametrize("hidden", [4, pytest.param(40, marks=pytest.mark.slow)])  # two matrices, and their product
def test_with_folded_affines_outputs_and_gradients_stay(kind: type[nn.Module], hidden: int) -> None:
    model, x = normed(kind, hidden), torch.randn(60, 16, dtype=torch.float64)
    assert affines(as_in_eager_mode(model, x).graphs[0]) == 3


class OverTokens(Mlp):
    """Normalises over 16 tokens and 16 channels at once: its weight has as many rows as fc1's."""

    def __init__(self) -> None:
        super().__init__(16, 16, norm=nn.LayerNorm((16, 16)))


class ByName(Mlp):
    """Gives fc1's tensors by name."""

    def __init__(self) -> None:
        super().__init__(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(input=self.norm(x), weight=self.fc1.weight, bias=self.fc1.bias)
        return x + self.fc2(nn.functional.gelu(hidden))


class Unused(Mlp):
    """Calls a norm whose result it does not need."""

    def __init__(self) -> None:
        super().__init__(16, 40)
        self.plain = nn.LayerNorm(16, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        self.plain(x)
        return super().forward(x)


class Squared(Mlp):
    """Holds what the norm gives against itself: it is the matrix, too."""

    def __init__(self) -> None:
        super().__init__(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = nn.functional.linear(h, h)
        return x + self.fc2(nn.functional.gelu(self.fc1(x))) + scores.mean()


@pytest.mark.parametrize("block", [OverTokens, ByName, Unused, Squared])
def test_what_is_no_norm_before_a_matrix_is_not_folded(block: type[nn.Module]) -> None:
    x = torch.randn(*(6, 16)[: 1 + (block is OverTokens)], 16).double()
    as_in_eager_mode(by_block([block() for _ in range(5)], x), x)


def test_affines_stay_under_autocast_and_are_folded_without_gradients() -> None:
    model, x = normed(nn.LayerNorm).float(), torch.randn(3, 16)
    with torch.no_grad():
        assert FoldAffines()(graph_of(model, x)).modified
    with torch.autocast("cpu", torch.bfloat16):
        assert not FoldAffines()(graph_of(model, torch.randn(60, 16))).modified
