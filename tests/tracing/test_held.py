"""Blocks that are held by what Python does not copy with a model."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.support.models import Layer, Row

REGISTRY: dict[int, Any] = {}


def cells(blocks: Any) -> list[Any]:
    def step(block: Any) -> Any:
        return lambda x: block(x)

    return [step(block) for block in blocks]


def globals_(blocks: Any) -> list[Any]:
    REGISTRY.update(enumerate(blocks))
    return [lambda x, i=i: REGISTRY[i](x) for i in range(len(blocks))]


HELD: dict[str, Callable[[Any], list[Any]]] = {
    "defaults": lambda blocks: [lambda x, block=block: block(x) for block in blocks],
    "cells": cells,
    "weak references": lambda blocks: [lambda x, ref=ref: ref()(x) for ref in map(weakref.ref, blocks)],
    "globals": globals_,
    "the list itself": lambda blocks: [lambda x, i=i: blocks[i](x) for i in range(len(blocks))],
}


class Steps(nn.Module):
    def __init__(self, hold: Callable[[Any], list[Any]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(5))
        self.steps = hold(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize("name", HELD)
def test_a_copy_that_would_run_the_users_own_is_refused(name: str) -> None:
    model, x = Steps(HELD[name]), torch.randn(2, 8)
    with pytest.raises(replfx.CaptureError, match=r"`blocks(\.0)?` is also held .*inplace=True"):
        replfx.transform(model, x)
    found = replfx.inspect(model, x)
    assert not found.replaced
    assert any("without inplace=True" in note for note in found.notes)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", HELD)
def test_a_capture_sees_blocks_that_are_held_elsewhere(name: str) -> None:
    model, x = Steps(HELD[name]), torch.randn(2, 8)
    graph = replfx.capture(model, x)
    assert {node.target for node in graph.graph.nodes if node.op == "call_module"} == {
        f"blocks.{i}.{part}" for i in range(5) for part in ("norm", "linear")
    }
    assert torch.equal(graph(x), model(x))


def test_a_parameter_that_a_closure_reads() -> None:
    class Tied(Row):
        def __init__(self) -> None:
            super().__init__(*(Layer() for _ in range(5)))
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.last = lambda x: x @ self.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x))

    model, x = Tied(), torch.randn(2, 8)
    with pytest.raises(replfx.CaptureError, match="`weight` is also held"):
        replfx.transform(model, x)
    made = replfx.transform(model, x, inplace=True)
    assert replfx.report(made).replaced == ["blocks.1", "blocks.3"]
    assert model.weight.grad is None  # the dry runs reached it
    made(x).sum().backward()
    assert model.weight.grad is not None
