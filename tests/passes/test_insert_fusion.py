"""Carrying out a plan: exactly the planned blocks are replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import replfx
from replfx.live import syntheses_of
from replfx.rewrite.build import build, install
from tests.support.models import GPT, ConvNet, Products, Stop, WithExtras, tower

X = torch.linspace(-1, 1, 8).view(2, 4)
IDS = torch.randint(0, 31, (2, 8))
MODELS = [
    ("tower", lambda: tower(7), X),
    ("convnet", lambda: ConvNet(4), torch.randn(2, 3, 8, 8)),
    ("gpt", lambda: GPT(depth=5), IDS),
    ("extras", WithExtras, X),
    ("recorded", lambda: Stop(tower(7)), X),
    ("recorded extras", lambda: Stop(WithExtras()), X),
]


@pytest.mark.parametrize("operator", ["block", "light", "identity"])
@pytest.mark.parametrize(("name", "make", "x"), MODELS, ids=[name for name, _, _ in MODELS])
def test_exactly_the_planned_blocks_are_replaced(name: str, make: type[nn.Module], x: Tensor, operator: str) -> None:
    if "extras" in name and operator == "light":
        pytest.skip("a block of two linear maps in no pair")
    torch.manual_seed(0)
    model = make()
    plan = replfx.plan(model, x, operator=operator)
    original, blocks = model(x), {r.path: model.get_submodule(r.path) for r in plan.replacements}
    assert len(blocks) >= 2
    install(model, build(model, plan))
    assert list(syntheses_of(model)) == list(blocks)
    assert all(model.get_submodule(path) is block for path, block in blocks.items())
    assert not torch.equal(model(x), original)


@pytest.mark.parametrize("operator", ["block", "light", "identity"])
def test_it_can_be_undone(operator: str) -> None:
    model = ConvNet(4)
    x, kinds = torch.randn(2, 3, 8, 8), [(type(module), list(vars(module))) for module in model.modules()]
    state, original = copy.deepcopy(model.state_dict()), model.eval()(x)
    install(model, build(model, replfx.plan(model, x, operator=operator))).restore()
    assert [(type(module), list(vars(module))) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(x), original)


def test_a_graph_of_many_regions_can_be_copied() -> None:
    result = replfx.transform(Products(256), X, every=2)
    assert torch.equal(copy.deepcopy(result)(X), result(X))
