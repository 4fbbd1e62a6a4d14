"""Release leaves nothing that speaks of nodes, and what the capture knows without them."""

import gc
import weakref

import torch

from replfx.chains.find import FindChains
from replfx.chains.select import SelectBlocks
from replfx.passes.pipeline import run_passes
from replfx.rewrite.release import Release
from replfx.tracing import capture_lazily, info_of
from tests.models import tower


def test_nodes_modules_and_chains_are_gone() -> None:
    model, x = tower(5), torch.randn(2, 4)
    graph = capture_lazily(model, x)
    run_passes(graph, [FindChains(), SelectBlocks(every=2)])
    outputs, rung = info_of(graph).outputs, info_of(graph).rung
    info_of(graph).notes.append("a note")
    node = weakref.ref(next(iter(graph.graph.nodes)))
    assert run_passes(graph, [Release()]).modified
    assert not list(graph.graph.nodes)
    assert not list(graph.children())
    info = info_of(graph)
    assert (info.outputs, info.rung, info.notes[-1]) == (outputs, rung, "a note")
    gc.collect()
    assert node() is None
    assert model(x).shape == (2, 3)
