"""The backend on syntheses that run in no module of their own: made of parameters alone is all that counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from replfx.dynamo.matching import syntheses_in
from replfx.passes.merge_syntheses import MergeSyntheses
from tests.support.compiled import Compiled, as_in_eager_mode, graph_of
from tests.support.computed import compute
from tests.support.models import Mlp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Attention(nn.Module):
    """Torch's attention reads its projections without calling their owners."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


class Twice(nn.Module):
    """Reads one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight) @ self.weight


TOKENS, PICTURES = (3, 4, 8), (2, 8, 5, 5)


def computed(block: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(block() for _ in range(5)))
    for i in (1, 3):
        compute(model, str(i), str(i - 1), str(i + 1))
    return model


@pytest.mark.parametrize(
    ("block", "shape", "expected", "cache"),
    [
        (Mlp, TOKENS, [2, 2], True),
        (Convolution, PICTURES, [2], False),
        (Attention, TOKENS, [2, 2], True),
        (Twice, TOKENS, [2], False),
        (Twice, TOKENS, [2], True),
    ],
)
def test_computed_weights_are_synthesised_together_and_once(
    block: Callable[[], nn.Module], shape: tuple[int, ...], expected: list[int], cache: bool
) -> None:
    model, x = computed(block).double(), torch.randn(shape, dtype=torch.float64)
    compiled = as_in_eager_mode(model, x, cache=cache)
    assert sorted(compiled.batches[0]) == expected
    assert (compiled.batches[-1] == []) == cache, "without gradients the last graph is what is left of the model"


def test_further_calls_compile_nothing() -> None:
    model = computed(Mlp).eval()
    compiled = Compiled(model)
    for _ in range(3):
        compiled(torch.randn(TOKENS))
    assert len(compiled.graphs) == 1


def test_one_block_alone() -> None:
    model = computed(Mlp)
    compiled = Compiled(model[1])
    x = torch.randn(TOKENS)
    torch.testing.assert_close(compiled(x), model[1](x))
    assert compiled.batches == [[]], "two weights of different shapes"
    assert len(syntheses_in(compiled.graphs[0].graph)) == 2


class Merged(nn.Module):
    """A low-rank update that is added to the weight: computed from parameters, and no synthesis."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.a, self.b = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.linear(x, self.fc.weight + self.b @ self.a, self.fc.bias)
        return nn.functional.linear(y, self.b @ self.a)


@pytest.mark.parametrize("cache", [True, False])
def test_what_else_is_made_of_parameters_keeps_its_results(cache: bool) -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), Merged(), Merged()).double(), torch.randn(3, 8, dtype=torch.float64)
    compiled = Compiled(model, cache=cache)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


# ---- what is written into, and what is handed out


class HandsOut(nn.Module):
    """Gives one computed weight three times, once as a view."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.inner[1].weight
        return self.inner(x), weight, self.inner[1].weight, self.inner[1].weight[:2]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("cache", [True, False])
def test_equal_results_are_not_one_tensor(inner: str, cache: bool) -> None:
    model = HandsOut(computed(Twice))
    x = torch.randn(TOKENS)
    compiled = Compiled(model, inner, cache=cache)
    with torch.no_grad():
        for _ in range(2):
            _, *weights = compiled(x)
            weights[0].zero_()
            assert weights[1].all()
            weights[1].zero_()
            assert weights[2].all()


def test_what_is_not_handed_out_is_merged_still() -> None:
    graph_module = graph_of(HandsOut(computed(Twice)), torch.randn(TOKENS))
    assert len(syntheses_in(graph_module.graph)) == 3 + 2 + 2
    assert MergeSyntheses()(graph_module).modified
    assert len(syntheses_in(graph_module.graph)) == 3 + 1 + 1


WRITES: dict[str, Callable[[Any, Any], object]] = {
    "p.data = …": lambda w, other: setattr(w, "data", w.data * 0.5),
    "p.data = …, of another": lambda w, other: setattr(w, "data", other.data.clone()),
    "through .data": lambda w, other: w.data.mul_(0.5),
    "at an index of .data": lambda w, other: w.data.__setitem__(0, 0.0),
    "an average": lambda w, other: w.data.lerp_(other.data, 0.5),
    "a list of .data": lambda w, other: torch._foreach_mul_([w.data], 0.5),
    "two lists of .data": lambda w, other: torch._foreach_lerp_([w.data, other.data], [other.data, w.data], 0.5),
    "in place": lambda w, other: w.detach().mul_(0.5),
    "a list in place": lambda w, other: torch._foreach_mul_([w.detach()], 0.5),
}


class Writes(nn.Module):
    """Writes into a neighbour's weight between the two blocks that read it."""

    def __init__(self, inner: Any, write: Callable[[Any, Any], object]) -> None:
        super().__init__()
        self.inner, self.write = inner, write

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.inner):
            if i == 2:
                self.write(self.inner[0].weight, self.inner[4].weight)
            x = block(x)
        return self.inner[1](x)  # which reads it again


@pytest.mark.parametrize(
    ("write", "cache"), [*((name, True) for name in WRITES), ("through .data", False), ("a list in place", False)]
)
def test_no_write_in_the_forward_pass_is_overlooked(write: str, cache: bool) -> None:
    results = []
    for compile in (True, False):
        model = Writes(computed(Twice), WRITES[write])
        run: Any = Compiled(model, cache=cache) if compile else model
        x = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            results.append([run(x) for _ in range(3)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(results[0][0], results[0][1]), "the write changes the result"
