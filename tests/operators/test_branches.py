"""`identity` for blocks that are branches of a sum in the code around them: what is left is the sum without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from tests.support.models import Mlp

WIDTH = 6


class Branch(Mlp):
    """x ↦ W₂ gelu(W₁ N(x)), with no sum of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return y


class Add(nn.Module):
    """A sum that is called whole, as a module without parts is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, y: Tensor, *, residual: Tensor, seen: list[Tensor]) -> Tensor:
        return y + self.scale * residual


class Gate(nn.Module):
    """Another function of two."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return x + y.sigmoid() * x


Sum = Callable[[Any, int, Tensor, Callable[[Tensor], Tensor]], Tensor]

BRANCHES: dict[str, Sum] = {
    "after": lambda model, i, x, f: f(x) + x,
    "before": lambda model, i, x, f: x + f(x),
    "norm": lambda model, i, x, f: x + f(model.norms[i](x)),
    "post_norm": lambda model, i, x, f: model.norms[i](x + f(x)),
    "norm_behind": lambda model, i, x, f: x + F.dropout(model.norms[i].weight * f(x), 0.0),
    "scaled": lambda model, i, x, f: torch.add(0.5 * f(x), x),
    "activation": lambda model, i, x, f: x + f(torch.relu(model.norms[i](x))),
    "parallel": lambda model, i, x, f: x + (f(model.norms[i](x)) + model.others[i](x)),
    "module": lambda model, i, x, f: model.adds[i](f(x), residual=x, seen=[x]),
    "norm_from_zero": lambda model, i, x, f: x + f(F.layer_norm(x, (WIDTH,)) * (1 + model.adds[i].scale)),
    "laid_out": lambda model, i, x, f: x + f(x.unsqueeze(1)).squeeze(1),
}
OTHERS: dict[str, Sum] = {
    "plain": lambda model, i, x, f: f(x),
    "gate": lambda model, i, x, f: x * f(x),
    "gate_module": lambda model, i, x, f: model.gate(f(x), x),
    "read_besides": lambda model, i, x, f: model.norms[i](x + (g := f(x))) + g.sum(1, keepdim=True),
    "another_layer_between": lambda model, i, x, f: x + f(model.others[i](x)),
    "of_another": lambda model, i, x, f: model.others[i](x) + f(x),
    "behind_a_layer": lambda model, i, x, f: x + model.others[i](f(x)),
}


class Net(nn.Module):
    """The sum is in `forward` here; blocks in `out` are left out of it by hand."""

    def __init__(self, combine: Sum, block: type[Mlp] = Branch, depth: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(WIDTH, 12) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.others = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.adds, self.gate = nn.ModuleList(Add() for _ in range(depth)), Gate()
        self.head = nn.Linear(WIDTH, 3)
        self.combine, self.out = combine, frozenset[int]()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            left_out = i in self.out
            x = self.combine(self, i, x, (lambda z: 0.0 * z) if left_out else block)
        y: Tensor = self.head(x)
        return y


def _pair(combine: Sum, block: type[Mlp] = Branch) -> tuple[Any, Any, Tensor]:
    """The model with blocks 1 and 3 left out, the plain one, and an input."""
    torch.manual_seed(0)
    plain, x = Net(combine, block).double(), torch.randn(4, WIDTH, dtype=torch.float64)
    return replfx.transform(plain, x, operator="identity"), plain, x


@pytest.mark.parametrize("name", BRANCHES)
def test_the_sum_is_left(name: str) -> None:
    made, plain, x = _pair(BRANCHES[name])
    plain.out = frozenset((1, 3))
    expected = plain(x)
    assert torch.equal(made(x), expected)
    assert torch.equal(replfx.materialize(made)(x), expected)
    made(x).sum().backward()
    expected.sum().backward()
    for parameter, (path, reference) in zip(made.parameters(), _left(plain), strict=True):
        if parameter.grad is None:
            assert reference.grad is None, path
        else:
            torch.testing.assert_close(parameter.grad, reference.grad, msg=path)


@pytest.mark.parametrize("name", BRANCHES)
def test_outputs_stay_when_it_is_unrolled(name: str) -> None:
    made, plain, x = _pair(BRANCHES[name])
    before, names = made(x), [path for path, _ in plain.named_parameters()]
    replfx.unroll(made)
    assert torch.equal(made(x), before)
    assert [path for path, _ in made.named_parameters()] == names
    made(x).square().sum().backward()
    assert all(block.fc2.weight.grad.any() for block in made.blocks)


@pytest.mark.parametrize("name", OTHERS)
def test_others_give_on_what_they_get(name: str) -> None:
    made, plain, x = _pair(OTHERS[name])
    reference = copy.deepcopy(plain)
    reference.blocks[1], reference.blocks[3] = nn.Identity(), nn.Identity()
    assert torch.equal(made(x), reference(x))


def test_a_block_with_a_sum_of_its_own_gives_on_what_it_gets() -> None:
    made, plain, x = _pair(BRANCHES["after"], Mlp)
    reference = copy.deepcopy(plain)
    reference.blocks[1], reference.blocks[3] = nn.Identity(), nn.Identity()
    assert torch.equal(made(x), reference(x))


def test_one_plan_tells_them_apart() -> None:
    """Equal blocks, some of which are added to their input: what is measured of one is not said of the other."""

    def combine(model: Any, i: int, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return x + f(x) if i < 3 else f(x)

    plan = replfx.plan(Net(combine), torch.randn(4, WIDTH), operator="identity")
    options = {r.path: r.operator.options for r in plan.replacements}
    assert options["blocks.1"].get("branch") is True
    assert "branch" not in options["blocks.3"]


def test_a_deep_model_is_read_in_one_go() -> None:
    """Each sum has two ways to the input, and sixty of them 2⁶⁰."""
    plan = replfx.plan(Net(BRANCHES["before"], depth=60), torch.randn(4, WIDTH), operator="identity")
    assert all(r.operator.options.get("branch") for r in plan.replacements)
    assert len(plan.replacements) == 29


def _left(plain: Any) -> list[tuple[str, nn.Parameter]]:
    return [(path, p) for path, p in plain.named_parameters() if not path.startswith(("blocks.1.", "blocks.3."))]
