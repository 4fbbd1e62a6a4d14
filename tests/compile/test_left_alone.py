"""What the backend's passes leave alone in Dynamo's graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import replfx
from replfx.dynamo.matching import syntheses_in
from replfx.live.synthesis import Reading
from tests.support.compiled import Compiled, X, graph_of, noting, small
from tests.support.models import Mlp, Tower, tower

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_a_model_that_synthesises_nothing_reaches_the_compiler_untouched() -> None:
    seen: list[fx.GraphModule] = []
    backend = replfx.backend(inner=noting(seen))

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
            return self.a.view(-1, 1) * (previous + next)

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
            if self.how == "write through .data" and index == 2:
                self.inner.blocks[2].fc1.weight.view(-1).data.mul_(0.5)
            with torch.set_grad_enabled(self.how != "grad" or index % 4 != self.first):
                x = block(x)
        return x


@pytest.mark.parametrize(
    ("how", "first"),
    [("write", 1), ("write in the same mode", 1), ("write through .data", 1), ("grad", 1), ("grad", 3)],
)
def test_nothing_moves_over_writes_and_modes(how: str, first: int) -> None:
    def results(compile: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Writes(small(), how, first)
        run: Any = Compiled(model, cache=True) if compile else model
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
        return self.inner.blocks(x + y)


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_nothing_is_merged_or_kept_over_modes(mode: Any) -> None:
    model = Modes(small(5, operator="light"), mode)
    compiled = Compiled(model, cache=True)
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
            return read.synthesized()["fc1.weight"]

    model.source = Synthesised()  # what a fusion layer reads has to be in the model
    readings = [dict(side) for side in reader.replfx._readings]
    readings[0]["fc1.weight"] = Reading(model.source, (), "weight", model.source)
    reader.replfx._readings = tuple(readings)
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
