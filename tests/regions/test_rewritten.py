"""Models whose blocks are regions of a graph: right for other inputs and in the other mode, or refused as they run."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from replfx.tracing import Limits, capture_lazily, limits_of
from replfx.tracing.inputs import Inputs
from tests.support.models import Products

X = torch.randn(4, 8)


class Loop(Products):
    """A loop over weights; `forward` is given by each test."""

    body = Products.forward

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(width=8)


def recorded(x: Tensor) -> Tensor:
    """What stops symbolic tracing and depends on nothing."""
    return x if len(x) > 0 else -x


Forward = Callable[[Any, Tensor], Tensor]
FREE: dict[str, Forward] = {
    "symbolic": lambda m, x: m.body(x),
    "symbolic, by shape": lambda m, x: m.body(x).sum(0) / x.shape[0],
    "recorded": lambda m, x: m.body(recorded(x)),
    "dropout by an argument": lambda m, x: F.dropout(m.body(recorded(x)), 0.5, training=m.training) * 0,
    "a constant read back": lambda m, x: m.body(recorded(x)) * torch.tensor(2.0).item(),
}
BY_SIZE: dict[str, Forward] = {
    "len": lambda m, x: m.body(x).sum(0) / len(x),
    "a branch on len": lambda m, x: m.body(x) * (1 if len(x) < 6 else 2),
    "a chunk": lambda m, x: m.body(x)[: len(x) // 4],
}
BY_MODE: dict[str, Forward] = {
    "symbolic, a branch": lambda m, x: m.body(x) * (0.5 if m.training else 1.0),
    "recorded, a branch": lambda m, x: m.body(recorded(x)) * (0.5 if m.training else 1.0),
}
BY_VALUE: dict[str, Forward] = {
    "a branch on values": lambda m, x: m.body(x) * (2 if x.sum() > 0 else 1),
    "a drawn branch": lambda m, x: m.body(x) * (2 if torch.rand(1) > 0.5 else 1),
    "Python's random numbers": lambda m, x: m.body(x) * random.random(),
}


def loop(forward: Forward) -> nn.Module:
    return type("Loop", (Loop,), {"forward": forward})()


def reference(model: nn.Module) -> nn.Module:
    twin: Any = copy.deepcopy(model)
    with torch.no_grad():
        for i in (1, 3):
            twin.w[i].copy_((twin.w[i - 1] + twin.w[i + 1]) / 2)
    return twin


@pytest.mark.parametrize("name", [*FREE, *BY_SIZE, *BY_MODE])
def test_right_or_refused(name: str) -> None:
    model = loop((FREE | BY_SIZE | BY_MODE)[name])
    made, wanted = replfx.transform(model, X), reference(model)
    ways = [(False, made), (True, pickle.loads(pickle.dumps(made))), (True, copy.deepcopy(made))]
    for training in (True, False):
        for x in (X, torch.cat([X, X]), X[:3], X[:1]):
            refused = (name in BY_SIZE and len(x) != 4) or (name in BY_MODE and not training)
            for _, way in ways:
                if refused:
                    with pytest.raises(replfx.CaptureError, match=r"dimension 0 .* has to be 4|holds in no other"):
                        way.train(training)(x)
                else:
                    torch.testing.assert_close(way.train(training)(x), wanted.train(training)(x))


@pytest.mark.parametrize("name", ["len", "recorded, a branch"])
def test_a_materialized_one_goes_on_checking_without_us(name: str) -> None:
    model = loop((BY_SIZE | BY_MODE)[name])
    made = replfx.transform(model, X)
    plain = replfx.materialize(made)
    torch.testing.assert_close(plain(X), reference(model)(X))
    assert b"replfx" not in pickle.dumps(plain)
    with pytest.raises(AssertionError, match=r"has to be 4|holds in no other"):
        plain.eval()(torch.cat([X, X]))


@pytest.mark.parametrize("name", ["recorded", "len"])
def test_compiled(name: str) -> None:
    made = replfx.transform(loop((FREE | BY_SIZE)[name]), X)
    compiled = torch.compile(made, backend="eager")
    torch.testing.assert_close(compiled(X), made(X))
    if name == "len":
        with pytest.raises(replfx.CaptureError):
            compiled(torch.cat([X, X]))


@pytest.mark.parametrize("name", BY_VALUE)
def test_what_values_or_chance_decide_is_not_frozen(name: str) -> None:
    model = loop(BY_VALUE[name])
    with pytest.raises(replfx.PlanError, match=r"decides by (values of tensors|random numbers)"):
        replfx.transform(model, X)
    found = replfx.inspect(model, X)
    assert not found.replaced
    assert any("decides by" in note for note in found.notes)


def test_limits() -> None:
    class Two(Loop):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.body(recorded(x)) + y.mean() + (len(y) if self.training else 1)

    model = Two()
    given = {"x": X, "y": torch.randn(3, 2)}
    inputs = Inputs.of(given, model)
    assert limits_of(capture_lazily(model, given), model, inputs) == Limits(((None, 8), (3, None)), True)
    model.eval()
    assert limits_of(capture_lazily(model, given), model, inputs) == Limits(((None, 8), (None, None)), False)
    assert model.training is False
