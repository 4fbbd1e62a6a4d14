"""Equal syntheses of one graph are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import replfx
from replfx.dynamo.matching import syntheses_in
from replfx.passes.merge_syntheses import MergeSyntheses
from tests.support.compiled import X, as_in_eager_mode, graph_of, small
from tests.support.models import tower

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Twice(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.blocks(self.inner.blocks(self.inner.stem(x)))


def products(graph_module: fx.GraphModule) -> int:
    """Products of two synthesised matrices."""
    return sum("matmul" in str(node.target) for node in graph_module.graph.nodes)


@pytest.mark.parametrize("options", [{"operator": "light"}, {"neighbour_gradient": 0.5}])
def test_a_layer_that_is_called_twice_synthesises_once(options: dict[str, Any]) -> None:
    model = Twice(replfx.transform(tower(), **options))
    graph_module = graph_of(model)
    count = len(syntheses_in(graph_module.graph))
    formed = products(graph_module)
    assert MergeSyntheses()(graph_module).modified
    assert 2 * len(syntheses_in(graph_module.graph)) == count == 8
    assert 2 * products(graph_module) == formed
    assert as_in_eager_mode(model.double(), X.double()).batches[0] == [2, 2]


def test_shared_readings_scale_their_gradient_once() -> None:
    graph_module = graph_of(small(neighbour_gradient=0.5))
    lerps = [node for node in graph_module.graph.nodes if node.target is torch.lerp]
    MergeSyntheses()(graph_module)
    left = [node for node in graph_module.graph.nodes if node.target is torch.lerp]
    assert (len(lerps), len(left)) == (12, 8), "four kept neighbours with two weights each"
