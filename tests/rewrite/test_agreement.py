"""inspect says what transform does; what had no gradient needs none; tied weights; refusals in their own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from replfx.rewrite import carry_out
from tests.support.models import Mlp, Net, Plain, Row, tower

X = torch.linspace(-1, 1, 24).view(3, 8)


def outcome(use: Callable[[], Any]) -> Any:
    try:
        return use()
    except replfx.ReplfxError as error:
        return error


class Chain(Net):
    """Blocks in a row, and a head."""

    def __init__(self, block: Callable[[], nn.Module] = Mlp) -> None:
        super().__init__(block)


class Cross(Mlp):
    """Has a normalisation and a map for an input that it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.other_norm, self.other = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        return x if context is None else x + self.other(self.other_norm(context))


class Without(Chain):
    """All of its blocks run without gradients."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = Row.forward(self, x)
        return self.head(x)


class Half(Chain):
    """The first two of its blocks do."""

    def forward(self, x: Tensor) -> Any:
        for index, block in enumerate(self.blocks):
            with torch.set_grad_enabled(index > 1):
                x = block(x)
        return self.head(x)


class Value(Chain):
    """Asks for a value, which fake tensors have not."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y if float(y.abs().max()) >= 0 else -y


class Reading(Chain):
    """Reads a weight of each block itself."""

    def forward(self, x: Tensor) -> Any:
        penalty = sum(block.fc1.weight.square().mean() for block in self.blocks)
        return super().forward(x), penalty


class Complex(Chain):
    def forward(self, x: Tensor) -> Any:
        return torch.view_as_complex(super().forward(x)[..., :2].contiguous())


MODELS = {
    "plain": Chain,
    "not residual": lambda: Chain(Plain),
    "a part that is not used": lambda: Chain(Cross),
    "without gradients": Without,
    "half without": Half,
    "asks for a value": Value,
    "reads weights": Reading,
    "complex output": Complex,
    "nothing to replace": lambda: nn.Sequential(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("operator", ["block", "mixer", "light", "identity"])
@pytest.mark.parametrize("name", MODELS)
def test_inspect_says_what_transform_does(name: str, operator: str) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = replfx.inspect(model, X, operator=operator)
    made = outcome(lambda: replfx.transform(model, X, operator=operator))
    if isinstance(made, replfx.ReplfxError):
        assert said.replaced == []
        assert said.notes
        return
    done = replfx.report(made)
    assert (said.replaced, said.refused) == (done.replaced, done.refused)
    assert said.parameters_after == done.parameters_after
    assert said.before is not None
    assert said.after is not None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["a part that is not used", "without gradients", "half without", "complex output"])
def test_what_had_no_gradient_needs_none(name: str) -> None:
    made = replfx.transform(MODELS[name](), X)
    assert replfx.report(made).replaced == ["blocks.1", "blocks.3"]


def test_a_model_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = carry_out.capture_lazily
    monkeypatch.setattr(carry_out, "capture_lazily", lambda *args: calls.append(1) or real(*args))
    replfx.inspect(tower(), torch.zeros(2, 4))
    assert len(calls) == 1


class Tied(nn.Module):
    """Two maps of one weight."""

    def __init__(self, *, vectors: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        if vectors:
            self.two.bias = self.one.bias
        else:
            self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


class Twice(nn.Module):
    """One map under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.again = self.one

    def forward(self, x: Tensor) -> Tensor:
        return x + self.again(torch.relu(self.one(x)))


def test_a_block_with_weights_that_are_one_is_refused() -> None:
    with pytest.raises(replfx.NoChainError, match=r"`1`: its `1.one.weight` and `1.two.weight` are one parameter"):
        replfx.transform(nn.Sequential(*(Tied() for _ in range(5))), X)


@pytest.mark.parametrize("block", [lambda: Tied(vectors=True), Twice])
def test_what_is_made_once_or_not_at_all_may_be_shared_inside(block: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(*(block() for _ in range(5)))
    made = replfx.transform(model, X)
    assert replfx.report(made).replaced == ["1", "3"]
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in replfx.unroll(made).parameters()) == count


def said(use: Callable[[], Any]) -> str:
    error = outcome(use)
    assert isinstance(error, replfx.ReplfxError)
    return str(error)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.block(x)
        return x


@pytest.mark.parametrize(
    ("use", "first"),
    [
        (lambda: replfx.transform(Chain(), X, neighbour_gradient=None), "neighbour_gradient must be a number"),
        (lambda: replfx.transform(Chain(), 3), "example_inputs is of type int"),
        (
            lambda: replfx.transform(Chain(), X, operator={"name": "block", "fast": 1}),
            "`blocks.1`: operator 'block' does not take the options {'fast': 1}: there is no option 'fast'",
        ),
        (
            lambda: replfx.transform(Chain(), X, fusion={"name": "scalar", "fast": 1}),
            "`blocks.1`: fusion 'scalar' does not take the options {'fast': 1}: there is no option 'fast'",
        ),
        (
            lambda: replfx.transform(Chain(Plain), X, operator="light"),
            "nothing can be replaced: `blocks.1`: operator 'light' does not fit it: it is not residual",
        ),
        (
            lambda: replfx.transform(Chain().requires_grad_(False), X),
            "nothing can be replaced: `blocks.1`: all its parameters are frozen",
        ),
        (lambda: replfx.transform(Shared(), X), "no chain of 3 blocks of one kind was found, so nothing"),
    ],
)
def test_a_refusal_begins_with_its_own_reason(use: Callable[[], Any], first: str) -> None:
    assert said(use).startswith(first)


def test_a_block_that_is_called_again_and_again_says_so() -> None:
    model = Shared()
    model.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert replfx.inspect(model, X).refused["block.0"] == "it is called 4 times in one forward pass"


class Found(Chain):
    """Gives as many rows as it finds, which is known by values alone."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y[y[:, 0] > y[:, 0].median().item()] if bool(y.isfinite().all()) else y[:1]


class Stopping(nn.Module):
    """Asks for values, and for a weight that a left out block has not."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()

    def forward(self, x: Tensor) -> Any:
        sizes = [len(getattr(block, "fc1").weight) for block in self.chain.blocks]  # noqa: B009
        return self.chain(x) if float(x.abs().max()) < sum(sizes) else x


def test_what_depends_on_values_is_run_for_real() -> None:
    made = replfx.transform(Found(), X)
    assert replfx.report(made).replaced == ["blocks.1", "blocks.3"]
    assert any("shapes and gradients not verified" in note for note in replfx.report(made).notes)
    made = outcome(lambda: replfx.transform(Stopping(), X, operator="identity"))
    assert isinstance(made, replfx.ReplfxError)
    assert replfx.inspect(Stopping(), X, operator="identity").replaced == []
